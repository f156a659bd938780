"""A run on conversations: gradients, packing, evaluation and scoring against plain torch."""

import json

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.check import check
from pipeline.config.load import ROOT
from pipeline.config.schema import RunConfig
from pipeline.data import load_raw, prepare_data
from pipeline.dropout.context import KeyedDropout
from pipeline.errors import InputError
from pipeline.evaluation.samples import scored_names
from pipeline.evaluation.score import rescore, score
from pipeline.evaluation.stage import evaluate
from pipeline.modality import MODALITIES
from pipeline.modality.bundle import modality_of
from pipeline.model import build_model, plan_for
from pipeline.packing import packed
from pipeline.records import RunFolder
from pipeline.train import train
from pipeline.verify.reference import one_step

LLAMA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 24, "max_position_embeddings": 128, "initializer_range": 0.2}
SIZES = {"train": 32, "validation": 8, "test": 8}
ANSWERS = ("yes it is", "no", "ask the dog about that")


def conversation(number):
    turns = [("user", f"is {number} odd?"), ("assistant", ANSWERS[number % 3])]
    turns += [("user", "sure?"), ("assistant", ANSWERS[(number + 1) % 3])] * (number % 2)
    start = [{"role": "system", "content": "be short"}] * (number % 4 == 0)
    return [*start, *({"role": role, "content": content} for role, content in turns)]


def config_in(folder, *, name="talks", micro=None, **data):
    files = {}
    for split, size in SIZES.items():
        files[split] = str(folder / f"{split}.jsonl")
        lines = [json.dumps({"messages": conversation(n), "channel": "web"}) for n in range(size)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    model = {"task": "text-generation", "model_type": "llama", "config_overrides": LLAMA}
    steps = {"global_batch_size": 16, "per_device_train_batch_size": micro, "max_steps": 2}
    template = str(ROOT / "configs/language/chatml.jinja")
    told = {"messages_column_name": "messages", "chat_template": template, "max_length": 96}
    return RunConfig.model_validate(
        {
            "name": name,
            "output_dir": str(folder),
            "model": model | {"tokenizer_vocab_size": 400},
            "data": {"path": "json", "data_files": files} | told | data,
            "train": steps | {"use_cpu": True, "learning_rate": 1e-2, "adam_epsilon": 1e-3},
            "dropout": {"insert": {"embedding": 0.2, "hidden": 0.2}},
            "evaluation": {"num_mc_passes": 3, "knn_neighbours": 2, "num_bootstrap_resamples": 20},
            "wandb": {"mode": "disabled"},
        }
    )


def opened(config):
    """Rows, collator and a model with keyed dropout, as training has them."""
    modality, raw = modality_of(config), load_raw(config)
    tokenizer = modality.load_processor(config, raw.train)
    rows = prepare_data(config, raw, tokenizer).train
    plan = plan_for(config, None, tokenizer)
    model = build_model(config, None, plan, tokenizer).train()
    keyed = KeyedDropout(model, plan, config.seed)
    return rows, modality.collator(tokenizer, config), model, keyed, modality.loss(0.0)


def gradients_of(batches, model, keyed, loss_of):
    """Gradients of a global batch that arrives in these micro-batches, and its items."""
    model.zero_grad()
    items = sum((batch["labels"] != -100).sum() for batch in batches)
    for batch in batches:
        given = dict(batch)
        ids, labels = given.pop("sample_id"), given.pop("labels")
        with keyed.context(purpose="train", index=0, row_ids=ids):
            loss_of(model(**given, use_cache=False), labels, items).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, int(items)


@pytest.mark.parametrize("layout", ["one batch", "four batches", "packed"])
def test_gradients_are_those_of_a_plain_loop_over_the_assistants_tokens(tmp_path, layout):
    rows, collate, model, keyed, loss_of = opened(config_in(tmp_path))
    rows = rows.select(range(16))
    one_step(model, keyed, list(rows), 0)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    size = 4 if layout == "four batches" else 16
    samples = list(packed(rows, 96) if layout == "packed" else rows)
    batches = [collate(samples[start : start + size]) for start in range(0, len(samples), size)]
    found, items = gradients_of(batches, model, keyed, loss_of)
    keyed.release()
    assert items == sum(sum(row["label_mask"][1:]) for row in rows)
    for name, gradient in found.items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2e-6 * scale, msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was trained in micro-batches of 4, and evaluated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        folder = tmp_path_factory.mktemp("talks")
        config, kept = config_in(folder, micro=4), []
        assert train(config) == 0
        run = RunFolder(folder / "talks")
        evaluate(run, config, lambda said: None, keep_profile=lambda run, rows: kept.append(rows))
        yield config, run, kept[0]


def test_training_in_one_batch_ends_in_the_same_weights(finished, tmp_path):
    config = config_in(tmp_path, micro=16)
    assert train(config) == 0
    expected = load_file(finished[1].model / "model.safetensors")
    for name, value in load_file(tmp_path / "talks/model/model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


@torch.no_grad()
def test_perplexity_is_over_the_assistants_tokens_alone(finished):
    _, run, scored = finished
    model = AutoModelForCausalLM.from_pretrained(run.model).eval()
    for row in scored.select(
        ["input_ids", "label_mask", "deterministic_perplexity", "num_tokens"]
    ).to_pylist():
        ids = torch.tensor([row["input_ids"]])
        kept = torch.tensor(row["label_mask"][1:]).bool()
        logits = model(input_ids=ids).logits[0, :-1][kept]
        loss = nn.functional.cross_entropy(logits, ids[0, 1:][kept])
        assert row["num_tokens"] == kept.sum()
        assert row["deterministic_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_scoring_gives_what_the_evaluation_gave_without_the_templates_file(finished, tmp_path):
    config, run, reference = finished
    gone = config.data.model_copy(update={"chat_template": "gone.jinja"})
    config = config.model_copy(update={"data": gone})
    test_file = config.data.data_files["test"]
    table = score(run, config, [test_file], tmp_path / "scored.parquet")
    assert table.equals(reference, check_metadata=True)
    assert {*table.column_names} == {*scored_names(MODALITIES["conversations"], False), "channel"}
    assert set(table["channel"].to_pylist()) == {"web"}
    again = rescore(run, config, table, [5, 1])
    columns = [name for name in again.column_names if name in table.column_names]
    assert again.select(columns).equals(table.take(pa.array([5, 1])).select(columns))


def test_a_run_trains_on_packed_conversations(tmp_path):
    config = config_in(tmp_path, packing=True)
    train_section = config.train.model_copy(update={"global_batch_size": 4})
    assert train(config.model_copy(update={"train": train_section})) == 0


def test_check_finds_what_the_template_refuses_before_there_are_weights(tmp_path):
    template = tmp_path / "refusing.jinja"
    template.write_text("{{ raise_exception('no system turn, please') }}")
    with pytest.raises(
        InputError,
        match=r"(?s)32 of 32 samples.*samples 0, 1, .*and 22 more: .*no system turn, please",
    ):
        check(config_in(tmp_path, chat_template=str(template)))
    with pytest.raises(InputError, match="trained here. has no chat template"):
        check(config_in(tmp_path, chat_template=None))


def test_check_says_how_many_conversations_have_nothing_to_learn(tmp_path):
    config = config_in(tmp_path, max_length=70, quarantine_budget=0.9)
    said = check(config)
    assert any("samples of train are set aside" in sentence for sentence in said)
