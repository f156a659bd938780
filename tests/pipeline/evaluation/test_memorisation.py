"""The probe of memory, on a model that remembers exactly what it is told to, and on a real run."""

import json
import math

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from monitoring.report import render_report
from pipeline.canaries import FIRST_ID, canaries, planted, without_canaries
from pipeline.config.schema import CanaryConfig, MemorisationConfig, RunConfig
from pipeline.data import load_raw, prepare_data
from pipeline.errors import DataError
from pipeline.evaluation.generation import Generator
from pipeline.evaluation.memorisation import (
    exposure,
    greedy,
    longest_run,
    memorisation_section,
    num_repeated,
)
from pipeline.evaluation.stage import evaluate, headline_numbers
from pipeline.modality.bundle import modality_of
from pipeline.records import RunFolder
from pipeline.train import train

PROBE = MemorisationConfig(num_prompts=9, prompt_tokens=3, continuation_tokens=6, k=4)
VOCABULARY = 50


class Parrot(PreTrainedModel, GenerationMixin):
    """Goes on as the rows that it knows, while they last and are kept to; else says 0."""

    config_class = PreTrainedConfig

    def __init__(self, known):
        super().__init__(PreTrainedConfig(vocab_size=VOCABULARY, num_hidden_layers=1))
        self.known, self.weight = known, nn.Parameter(torch.zeros(1))

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}  # all of them: a parrot keeps no cache

    def following(self, tokens):
        whole = (row for row in self.known if row[: len(tokens)] == tokens)
        row = next(whole, [])
        return row[len(tokens)] if len(row) > len(tokens) else 0

    def forward(self, input_ids, attention_mask=None, **others):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for one, row in enumerate(input_ids.tolist()):
            for place in range(len(row)):
                logits[one, place, self.following(row[: place + 1])] = 5.0
        return CausalLMOutput(logits=logits)


def tokens_of(number, length=9):
    return [1 + (11 * number + 3 * place * place) % (VOCABULARY - 1) for place in range(length)]


def rows_of(numbers):
    rows = [tokens_of(number) for number in numbers]
    return Dataset.from_dict({"input_ids": rows, "sample_id": list(range(len(rows)))})


def config_of(**data):
    return RunConfig.model_validate(
        {
            "name": "t",
            "model": {"task": "text-generation", "model_type": "llama"},
            "data": {"path": "json", "max_length": 16} | data,
            "evaluation": {"memorisation": PROBE.model_dump(), "batch_size": 4},
        }
    )


def fake_tokenizer():
    class Words:
        all_special_ids = (0, 1)

        def __len__(self):
            return VOCABULARY

        def decode(self, tokens, skip_special_tokens):
            return str(tokens)

    return Words()


def asking(model):
    return Generator(model, None, fake_tokenizer(), 1)


def plain_run(first, second):
    """By trying all pairs of places."""
    best = 0
    for i in range(len(first)):
        for j in range(len(second)):
            size = 0
            while first[i + size : i + size + 1] and (
                first[i + size : i + size + 1] == second[j + size : j + size + 1]
            ):
                size += 1
            best = max(best, size)
    return best


def test_the_longest_run_is_that_of_a_search_through_all_places():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        first, second = torch.randint(0, 3, (2, 12), generator=generator).tolist()
        assert longest_run(first, second) == plain_run(first, second)


def test_greedy_continuations_are_those_of_one_row_at_a_time():
    generator = asking(Parrot([tokens_of(1), tokens_of(2)]))
    prompts = torch.tensor([tokens_of(number)[:3] for number in (1, 2, 3)])
    said = greedy(generator, prompts, 6)
    assert said == [tokens_of(1)[3:], tokens_of(2)[3:], [0] * 6]
    assert all(greedy(generator, p[None], 6)[0] == s for p, s in zip(prompts, said, strict=True))


def test_what_is_remembered_is_counted_and_a_shorter_run_is_not():
    whole, part = tokens_of(1), [*tokens_of(2)[:6], 49, 49, 49]
    generator = asking(Parrot([whole, part]))  # of the second row, three tokens of the continuation
    pairs = [(tokens_of(n)[:3], tokens_of(n)[3:]) for n in (1, 2, 3)]
    assert num_repeated(generator, pairs, PROBE, batch_size=2) == 1
    assert num_repeated(generator, pairs, PROBE.model_copy(update={"k": 3}), 2) == 2


def test_training_rows_are_held_against_rows_that_were_not_trained_on():
    known, config = range(12), config_of()
    model = Parrot([tokens_of(number) for number in known])
    found = memorisation_section(
        model, rows_of(known), rows_of(range(20, 30)), config, fake_tokenizer()
    )
    assert (found["train"]["num_repeated"], found["train"]["num_prompts"]) == (9, 9)
    assert (found["control"]["num_repeated"], found["control"]["share"]) == (0, 0.0)
    assert found["p_value"] == pytest.approx(1 / math.comb(18, 9))  # Fisher, by hand
    low, high = found["train"]["interval"]
    assert low == pytest.approx(9 / (9 + 1.959964**2))  # Wilson, by hand
    assert high == 1.0
    assert "canaries" not in found


def test_canaries_that_are_remembered_have_the_largest_exposure():
    config, words = config_of(canaries={"num_canaries": 3, "num_tokens": 8}), fake_tokenizer()
    told = canaries(config.seed, config.data.canaries, words, 0)
    for known, share, least, most in ((told, 1.0, math.log2(201), 8), ([], 0.0, 0, 7)):
        model = Parrot(known)
        found = memorisation_section(model, rows_of([1]), rows_of([2]), config, words)["canaries"]
        assert found["share"] == share
        assert least <= found["mean_exposure"] <= most


def test_exposure_is_the_rank_among_references():
    references = torch.arange(1.0, 8.0)  # 7 of them
    assert exposure(torch.tensor([0.5, 4.5, 9.0]), references).tolist() == pytest.approx(
        [3.0, 3 - math.log2(5), 0.0]
    )


def test_canaries_are_planted_behind_the_rows_and_follow_from_the_seed():
    config, words = (
        config_of(canaries={"num_canaries": 2, "num_tokens": 5, "repeats": 3}),
        fake_tokenizer(),
    )
    rows = rows_of(range(4))
    found = planted(rows, config, words)
    assert len(found) == 4 + 6
    assert min(found["sample_id"][4:]) == FIRST_ID
    assert len({tuple(row) for row in found["input_ids"][4:]}) == 2
    assert all(1 < token < VOCABULARY for row in found["input_ids"][4:] for token in row)
    assert list(without_canaries(found)) == list(rows)
    more = CanaryConfig(num_canaries=5, num_tokens=5)
    assert canaries(config.seed, more, words, 0)[:2] == found["input_ids"][4::3]


def test_rows_too_short_to_ask_for_are_said():
    config = config_of()
    short = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]], "sample_id": [0]})
    with pytest.raises(DataError, match=r"prompts of 3 tokens with 4 behind them, but no training"):
        memorisation_section(Parrot([]), short, rows_of([1]), config, fake_tokenizer())


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(ValueError, match="k tokens cannot be repeated"):
        MemorisationConfig(k=9, continuation_tokens=8)
    with pytest.raises(ValueError, match=r"prompt_tokens \+ k is above data\.max_length \(6\)"):
        config_of(max_length=6)


LLAMA = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 32, "max_position_embeddings": 32}


def test_a_run_remembers_its_canaries_and_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    lines = [json.dumps({"text": f"the {n} cows of {n * n} farms eat"}) for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    model = {"task": "text-generation", "model_type": "llama", "tokenizer_vocab_size": 300}
    steps = {"global_batch_size": 16, "max_steps": 90, "learning_rate": 2e-2, "use_cpu": True}
    config = RunConfig.model_validate(
        {
            "name": "parrot",
            "output_dir": str(tmp_path),
            "model": model | {"config_overrides": LLAMA},
            "data": {
                "path": "json",
                "data_files": str(tmp_path / "rows.jsonl"),
                "validation_split": "train[18:21]",
                "test_split": "train[21:]",
                "train_split": "train[:18]",
                "max_length": 24,
                "canaries": {"num_canaries": 2, "num_tokens": 12, "repeats": 12},
            },
            "train": steps | {"disable_tqdm": True},
            "dropout": {"insert": {"hidden": 0.02}},
            "evaluation": {
                "num_mc_passes": 2,
                "knn_neighbours": 2,
                "num_bootstrap_resamples": 20,
                "memorisation": {"prompt_tokens": 6, "continuation_tokens": 8, "k": 4},
            },
            "wandb": {"mode": "disabled"},
        }
    )
    assert train(config) == 0
    run = RunFolder(tmp_path / "parrot")
    report = evaluate(run, config)
    found = report["memorisation"]["canaries"]
    assert found["share"] == 1.0
    assert found["mean_exposure"] == pytest.approx(math.log2(201))
    assert headline_numbers(report)["eval/memorised_canaries"] == 1.0
    page = render_report(run)
    assert 'id="memorisation"' in page
    raw = load_raw(config)
    prepared = prepare_data(config, raw, modality_of(config).load_processor(config, raw.train))
    assert sum(one >= FIRST_ID for one in prepared.train["sample_id"]) == 24
