"""`masklock check`: every error at once, before weights load."""

import json

import pytest
from safetensors.torch import save_file

from pipeline.check import check, plan
from pipeline.errors import InputError


def problems_of(config) -> list[str]:
    with pytest.raises(InputError) as error:
        check(config)
    return str(error.value).split("\n\n")


def test_a_sound_configuration_is_told_what_it_would_do(run_config):
    lines = check(run_config())
    assert lines[0] == "Data: 24 train, 6 validation, 6 test rows, 2 classes; 2 steps of 8."
    assert lines[1].startswith("Dropout sites in force: 1 embedding, 2 attention, 4 hidden, 1 head")
    assert lines[-1] == "No errors."


def test_a_check_writes_nothing(run_config, tmp_path):
    before = sorted(tmp_path.iterdir())
    check(run_config())
    assert sorted(tmp_path.iterdir()) == before


def test_all_errors_are_found_at_once(run_config, tmp_path):
    problems = problems_of(
        run_config(
            data={"max_length": 99, "text_column_name": "words"},
            train={"metric_for_best_model": "beauty", "load_best_model_at_end": True}
            | {"eval_steps": 1, "save_steps": 1, "extra": {"no_such_field": 1}},
        )
    )
    assert len(problems) == 4
    for text in ("no_such_field", "beauty", "words", "data.max_length is 99"):
        assert sum(text in problem for problem in problems) == 1, text


def test_errors_of_model_data_and_plan_stand_side_by_side(run_config):
    dropout = {"activation": 0.1, "overrides": {"nothing": 0.1}}
    data = {"data_files": {"train": "nowhere.jsonl"}}
    problems = problems_of(run_config(dropout=dropout, data=data))
    assert len(problems) == 2
    assert "nowhere.jsonl" in problems[0]
    assert "no activation dropout" in problems[1]
    assert "'nothing' matches no site" in problems[1]


def test_weights_and_tokenizer_are_checked_without_loading_them(run_config, pretrained):
    tokenizer = json.loads((pretrained / "tokenizer_config.json").read_text())
    for name in ("pad_token", "eos_token", "bos_token"):
        tokenizer[name] = None
    (pretrained / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    save_file({}, pretrained / "model.safetensors")
    model = {"model_name_or_path": str(pretrained), "weights_sha256": "0" * 64}
    problems = problems_of(run_config(model=model))
    assert len(problems) == 2
    assert "is not the file asked for" in problems[0]
    assert "pad_token" in problems[1]


def test_the_folder_of_another_run_is_refused(run_config, tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "letter.txt").touch()
    (problem,) = problems_of(run_config())
    assert "is not a run of Masklock" in problem


def test_the_plan_needs_no_data(run_config):
    config = run_config(data={"data_files": {"train": "nowhere.jsonl"}})
    assert len(plan(config).in_force()) == 8


def test_packing_is_tried_on_a_model_of_this_kind(run_config):
    def model(kind, **shape):
        return {"task": "text-generation", "model_type": kind, "tokenizer_vocab_size": 300} | {
            "config_overrides": {"hidden_size": 16} | shape
        }

    llama = model("llama", num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    data = {"packing": True, "max_length": 16}
    assert check(run_config(model=llama, data=data))[-1] == "No errors."
    mamba = model("mamba", num_hidden_layers=1)
    (problem,) = problems_of(run_config(model=mamba, data=data))
    assert "but mamba lets tokens see other documents of their row" in problem
