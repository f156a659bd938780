"""What a run says to test prompts: measures held against plain loops, and a whole run."""

import json

import numpy as np
import pytest
import torch
from pyarrow import parquet
from scipy.stats import entropy

from monitoring.report import render_report
from pipeline.config.schema import RunConfig
from pipeline.data import load_raw
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import DataError
from pipeline.evaluation.generation import Decoding, Generator, Rows
from pipeline.evaluation.opening import open_predictor
from pipeline.evaluation.sequences import SequenceJudge, sequence_section
from pipeline.evaluation.stage import evaluate, headline_numbers
from pipeline.modality.prompts import prompt_collator, text_prompt, turn_prompt
from pipeline.records import RunFolder
from pipeline.train import train
from pipeline.trained import trained_processor

LLAMA = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 32, "max_position_embeddings": 64}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def config_of(tmp_path, **evaluation):
    rows = [
        {"messages": [{"role": "user", "content": f"{n} cows"},
                      {"role": "assistant", "content": "red" if n % 2 else "blue"},
                      {"role": "user", "content": f"and {n} more"},
                      {"role": "assistant", "content": "many" if n % 3 else "none"}]}
        for n in range(24)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return RunConfig.model_validate(
        {
            "name": "chat",
            "output_dir": str(tmp_path),
            "model": {"task": "text-generation", "model_type": "llama", "config_overrides": LLAMA,
                      "tokenizer_vocab_size": 300},
            "data": {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "max_length": 64,
                     "messages_column_name": "messages", "train_split": "train[:16]",
                     "chat_template": str(tmp_path / "chat.jinja"),
                     "validation_split": "train[16:19]", "test_split": "train[19:]"},
            "train": {"global_batch_size": 8, "max_steps": 3, "use_cpu": True,
                      "learning_rate": 1e-2, "disable_tqdm": True},
            "dropout": {"attention": 0.1, "insert": {"hidden": 0.3}},
            "evaluation": {"num_mc_passes": 3, "knn_neighbours": 2, "num_bootstrap_resamples": 20,
                           "batch_size": 2,
                           "generation": {"max_new_tokens": 6, "num_samples": 3} | evaluation},
            "wandb": {"mode": "disabled"},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    assert train(config_of(folder)) == 0
    return folder


def test_a_text_is_cut_after_so_many_tokens_and_a_conversation_before_its_last_turn():
    row = {"input_ids": [5, 6, 7, 8], "sample_id": 3}
    assert text_prompt(row, 3).row == {"input_ids": [5, 6, 7], "sample_id": 3}
    assert text_prompt(row, 3).reference == [8]
    assert text_prompt(row, 4) is None
    talk = {"input_ids": [1, 2, 3, 4, 5, 6, 7], "label_mask": [0, 1, 1, 0, 1, 1, 0]}
    found = turn_prompt(talk, 3)
    assert (found.row["input_ids"], found.reference) == ([1, 2, 3, 4], [5, 6])
    assert turn_prompt({"input_ids": [1, 2], "label_mask": [1, 1]}, 3) is None


def test_prompts_are_padded_on_the_left():
    class Tokenizer:
        pad_token_id = 9

    batch = prompt_collator(Tokenizer(), None)([{"input_ids": [1]}, {"input_ids": [2, 3]}])
    assert batch["input_ids"].tolist() == [[9, 1], [2, 3]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]


def test_measures_are_those_of_a_loop_over_passes(trained):
    """One sequence at a time, under each network: log-probabilities, entropies and their means."""
    config, run = config_of(trained), RunFolder(trained / "chat")
    processor = trained_processor(run, config)
    predictor = open_predictor(run, config, DropoutPlan.read(run.plan), processor)
    keyed, model = predictor.monte_carlo.keyed, predictor.model
    judge = SequenceJudge(Generator(model, keyed, processor, config.seed), config, processor)
    prompt = {"input_ids": [7, 50, 61, 9], "label_mask": [0, 0, 0, 1], "sample_id": 11}
    ids = torch.tensor([[7, 50, 61]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens = list(judge.generator.generate(given, Rows(torch.tensor([11])), Decoding(6))[0].tokens)
    whole, passes = torch.tensor([[7, 50, 61, *tokens]]), []
    for index in range(3):
        with (
            torch.no_grad(),
            keyed.context(purpose="mc", index=index, row_ids=torch.tensor([11])),
        ):
            passes.append(model(whole, use_cache=False).logits[0, 2:-1].double().softmax(-1))
    p = torch.stack(passes).numpy()
    chosen = p[:, np.arange(len(tokens)), tokens]
    row = judge.rows([prompt])[0]
    mean, single = entropy(p.mean(0), axis=-1), entropy(p, axis=-1).mean(0)
    expected = {
        "generated_log_probability": np.log(chosen.mean(0)).mean(),
        "generated_sequence_log_probability": np.log(chosen.mean(0)).sum(),
        "generated_joint_log_probability": np.log(chosen.prod(1).mean()),
        "generated_predictive_entropy": mean.mean(),
        "generated_mutual_information": (mean - single).mean(),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("same_meaning", ["match", "embedding"])
def test_an_evaluation_says_how_sure_the_model_is_of_what_it_says(trained, same_meaning):
    config, run = config_of(trained, same_meaning=same_meaning), RunFolder(trained / "chat")
    report = evaluate(run, config)
    section = report["generation"]
    assert section["num_prompts"] == 5
    assert section["means"]["generated_log_probability"] < 0
    assert 0 <= section["means"]["semantic_entropy"] <= np.log(3) + 1e-9
    samples = parquet.read_table(run.samples).to_pandas()
    assert samples["reference_text"].isin(["many", "none"]).all()
    assert samples["semantic_entropy"].mean() == pytest.approx(section["means"]["semantic_entropy"])
    assert headline_numbers(report)["eval/sequences_generated_chrf"] == pytest.approx(
        samples["generated_chrf"].mean()
    )
    assert 'id="generation"' in render_report(run)


def test_batches_change_nothing_of_what_is_said(trained):
    run, found = RunFolder(trained / "chat"), []
    for batch_size in (1, 5):
        config = config_of(trained, num_beams=2)
        evaluation = config.evaluation.model_copy(update={"batch_size": batch_size})
        evaluate(run, config.model_copy(update={"evaluation": evaluation}))
        table = parquet.read_table(run.samples).to_pandas()
        found.append(table[["generated_text", "least_risk_text", "semantic_entropy"]])
    assert found[0].equals(found[1])


def test_rank_correlation_is_minus_one_where_the_less_certain_is_the_worse():
    rows = [
        {"sample_id": n, "generated_chrf": quality, "generated_log_probability": -float(n),
         "semantic_entropy": 1.0}
        for n, quality in enumerate([0.9, 0.7, 0.2])
    ]  # fmt: skip
    settings = RunConfig.model_validate(
        {"name": "t", "model": {"task": "text-generation", "model_type": "llama"},
         "data": {"path": "json"}, "evaluation": {"generation": {}}}
    ).evaluation.generation  # fmt: skip
    found = sequence_section(rows, settings)["rank_correlation"]
    assert found == {"generated_log_probability": -1.0, "semantic_entropy": None}


def test_models_that_say_nothing_are_refused(run_config):
    config = run_config(evaluation={"generation": {}})
    with pytest.raises(DataError, match="evaluation.generation: models of text-classification say"):
        load_raw(config)
