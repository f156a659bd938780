"""What the program says to bad input: one clear error, exit code 2, no traceback, no file."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from pipeline import __main__ as command_line
from pipeline import check as check_stage
from pipeline import checkpoint
from pipeline.config.load import dump_config, load_config
from pipeline.library_output import without_waiting_lines
from pipeline.model import plan_for

Run = Callable[..., tuple[int, str, str]]

YAML = """
name: good
output_dir: runs
model: {task: text-classification, model_name_or_path: bert}
data: {path: data, max_length: 16}
train: {global_batch_size: 8, max_steps: 2, use_cpu: true, disable_tqdm: true}
dropout: {hidden: 0.1}
wandb: {mode: disabled}
"""
WORDS = {"[PAD]": 0, "[UNK]": 1, "[END]": 2, "good": 3, "bad": 4}
NOWHERE = "there is no such folder"

# name: (arguments behind `check good.yaml`, what the error must say)
SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "an unknown key": (
        ["train.learnig_rate=1", "dropout.hiden=0.1"],
        ["train.learnig_rate: unknown key", "learning_rate?", "dropout.hiden", "hidden?"],
    ),
    "a value of the wrong type": (
        ["train.max_steps=many", "dropout.hidden=2"],
        ["train.max_steps", "integer", "'many'", "dropout.hidden", "found 2"],
    ),
    "an override without value": (["train.max_steps"], ["written key=value"]),
    "an unknown task": (
        ["model.task=text-clasification"],
        ["model.task", "'text-clasification'", "did you mean text-classification?"],
    ),
    "a missing column": (
        ["data.text_column_name=body"],
        ["no column 'body'", "there are: text, label", "text_column_name"],
    ),
    "a label outside the names": (
        ["data.path=odd_label"],
        ["validation split", "label 'odd'", "row 1", "no, yes"],
    ),
    "empty text": (["data.path=empty_text"], ["train split", "no text in rows 1, 2", "leave them"]),
    "fewer rows than a global batch": (
        ["train.global_batch_size=64"],
        ["global batch takes 64 samples", "only 16", "smaller batch or more data"],
    ),
    "a split that is not there": (
        ["data.test_split=tst"],
        ["data.test_split", "'tst'", "train (16 rows)", "test (4 rows)"],
    ),
    "a data set that is not there": (
        ["data.path=json", "data.data_files=none.jsonl"],
        ["could not be loaded", "none.jsonl"],
    ),
    "a model that the hub would have": (
        ["model.model_name_or_path=owner/none"],
        ["'owner/none'", "Looked for: a folder", "HF_HUB_OFFLINE is set", "hf download"],
    ),
    "a model folder that is not there": (["model.model_name_or_path=./none"], ["./none", NOWHERE]),
    "a folder without a model": (
        ["model.model_name_or_path=data"],
        ["folder 'data'", "model_type", "dataset_dict.json"],
    ),
    "a package that is not installed": (
        ["model.model_name_or_path=package:no.such/x"],
        ["no.such is not installed", "pip install"],
    ),
    "an architecture that does not exist": (
        ["model.model_name_or_path=null", "model.model_type=lama"],
        ["'lama'", "near it: llama"],
    ),
    "a model option that does not exist": (
        ["model.config_overrides.num_layrs=3"],
        ["num_layrs", "did you mean num_hidden_layers?"],
    ),
    "a tokenizer that is not there": (
        ["model.tokenizer_name_or_path=data"],
        ["tokenizer in the folder 'data'", "holds: dataset_dict.json"],
    ),
    "a tokenizer of another model": (
        ["model.tokenizer_name_or_path=large_tokenizer"],
        ["has 40 tokens, the model 16", "model.tokenizer_name_or_path"],
    ),
    "a sequence longer than the model allows": (
        ["data.max_length=64"],
        ["data.max_length is 64", "allows 32 positions", "at most 32"],
    ),
    "an attention that cannot do the rate": (
        ["model.attn_implementation=sdpa", "dropout.attention=0.1"],
        ["attention dropout is 0.1", "sdpa", "own masks", "attn_implementation: eager"],
    ),
    "an attention that does not exist": (
        ["model.attn_implementation=sdp", "dropout.attention=0"],
        ["sdp, which bert cannot use", "eager or sdpa"],
    ),
    "a model that reads in both directions": (
        ["model.task=text-generation"],
        ["bert reads text in both directions", "is_decoder to true", "causal model"],
    ),
    "a rate that reaches no site": (
        ["dropout.activation=0.1"],
        ["dropout.activation is 0.1", "no activation dropout", "it has: attention"],
    ),
    "inserted sites without a place": (
        ["dropout.insert.hidden=0.1"],
        ["dropout.insert.hidden", "no modules"],
    ),
    "a pattern that matches no site": (
        ['dropout.overrides={"*.layer.9.*": 0.2}'],
        ["'*.layer.9.*' matches no site", "masklock plan"],
    ),
    "an adapter on nothing": (
        ["peft.target_modules=[nope]"],
        ["peft: the LORA adapter", "target_modules"],
    ),
    "an adapter that lacks a field": (
        ["peft.peft_type=PROMPT_TUNING"],
        ["PROMPT_TUNING", "cannot be put on this model", "fields under peft"],
    ),
    "weights with another sha256": (
        ["model.weights_sha256=" + "f" * 64],
        ["bert/model.safetensors", "f" * 64, "Nothing was loaded"],
    ),
    "a run folder of another configuration": (
        ["output_dir=other", "seed=7"],
        ["other/good", "  - seed: 42 -> 7", "Choose another name"],
    ),
    "a folder of something else": (
        ["output_dir=.", "name=data"],
        ["holds no config.yaml", "not a run", "delete the folder"],
    ),
    "a file in place of the run folder": (["output_dir=good.yaml"], ["good.yaml is a file"]),
    "an optimizer whose package is missing": (
        ["train.optim=lomo"],
        ["train.optim", "lomo_optim", "pip install"],
    ),
    "a schedule that lacks an argument": (
        ["train.lr_scheduler_type=cosine_with_min_lr"],
        ["train.lr_scheduler_kwargs", "cosine_with_min_lr", "min_lr"],
    ),
    "an argument that the schedule lacks": (
        ["train.lr_scheduler_kwargs={foo: 1}"],
        ["train.lr_scheduler_kwargs", "linear refuses", "foo"],
    ),
    "several at once": (
        ["data.text_column_name=b", "data.max_length=64", "train.metric_for_best_model=f7"],
        ["'f7' is not one of loss", "train split: there is no column 'b'", "at most 32"],
    ),
}
# What only the start of a training can show, or what it must not learn too late.
ALSO_IN_TRAINING = [
    "a missing column",
    "a label outside the names",
    "fewer rows than a global batch",
    "a model that the hub would have",
    "a sequence longer than the model allows",
    "an attention that cannot do the rate",
    "weights with another sha256",
    "an argument that the schedule lacks",
    "a run folder of another configuration",
    "a file in place of the run folder",
]

# Commands on files and runs: (the whole command line, what the error must say)
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "no such configuration": (["check", "god.yaml"], ["no such file", "did you mean good.yaml?"]),
    "a binary configuration": (["check", "binary.yaml"], ["not UTF-8 text"]),
    "a configuration that is no YAML": (["check", "broken.yaml"], ["line 2", "not YAML"]),
    "an empty configuration": (["check", "empty.yaml"], ["empty", "configs/"]),
    "a folder without run": (["report", "data"], ["no run folder", "config.yaml"]),
    "evaluation before training": (["evaluate", "good.yaml"], ["runs/good", "Train it first"]),
    "evaluation of an unfinished run": (["evaluate", "other/good"], ["not finished", "Train it"]),
    "export of an unfinished run": (["export", "other/good", "out"], ["no trained model"]),
    "a report of nothing": (["report", "other/good"], ["metrics.jsonl", "masklock evaluate"]),
    "a damaged plan": (
        ["mask", "damaged/good", "--site", "dropout", "--sample", "1", "--step", "1"],
        ["plan.json", "damaged", "Train the run again"],
    ),
    "a mask of no site": (
        ["mask", "other/good", "--site", "nope", "--sample", "1", "--step", "1"],
        ["No site 'nope'", "bert.embeddings.dropout#0"],
    ),
    "a mask of no sample": (
        ["mask", "other/good", "--site", "dropout", "--sample", str(2**60), "--step", "1"],
        ["Sample ids lie between 0 and 2**56"],
    ),
    "a mask without coordinates": (["mask", "other/good"], ["--site NAME", "--sample ID"]),
    "no such cases": (["mask", "none.json"], ["none.json", "No such file"]),
    "cases that are no JSON": (["mask", "broken.json"], ["broken.json", "cannot be read"]),
    "cases of another form": (["mask", "list.json"], ['"rows", "attention"']),
    "a case without arguments": (["mask", "case.json"], ["rows[0].arguments"]),
    "export to a full folder": (["export", "finished/good", "data"], ["data is not empty"]),
    "export to a file": (["export", "finished/good", "good.yaml"], ["is a file"]),
    "trained weights that are damaged": (
        ["evaluate", "finished/good"],
        ["finished/good/model", "cannot be read"],
    ),
}


def rows(number: int, **columns: list) -> Dataset:
    return Dataset.from_dict(
        {"text": ["good bad"] * number, "label": ["yes", "no"] * (number // 2)} | columns
    )


def save_data(folder: Path, **splits: Dataset) -> None:
    DatasetDict({"train": rows(16), "validation": rows(4), "test": rows(4)} | splits).save_to_disk(
        folder
    )


def save_tokenizer(folder: Path, size: int, **special: str) -> None:
    more = {f"word{number}": number for number in range(len(WORDS), size)}
    core = Tokenizer(models.WordLevel(WORDS | more, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)


def save_run(folder: Path, plan: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(load_config("good.yaml")))
    (folder / "plan.json").write_text(plan)
    (folder / "labels.json").write_text('["no", "yes"]')


def save_files() -> None:
    Path("good.yaml").write_text(YAML)
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    Path("broken.yaml").write_text("name: a\n  b: c\n")
    Path("empty.yaml").write_text("")
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("case.json").write_text('{"rows": [{"a": 1}]}')


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder with a small model, data, and every kind of bad file."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("bad_input")
        patch.chdir(path)
        save_files()
        save_data(path / "data")
        save_data(path / "odd_label", validation=rows(4, label=["yes", "odd", "no", "no"]))
        save_data(path / "empty_text", train=rows(16, text=["good", " ", ""] + ["good"] * 13))
        small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        shape = {"num_hidden_layers": 1, "max_position_embeddings": 32, "vocab_size": 16}
        BertForSequenceClassification(BertConfig(**small, **shape)).save_pretrained("bert")
        save_tokenizer(path / "bert", 16, pad_token="[PAD]")
        save_tokenizer(path / "large_tokenizer", 40, pad_token="[PAD]")
        save_tokenizer(path / "unpadded", 16, eos_token="[END]")
        plan = json.dumps(plan_for(load_config("good.yaml"), ("no", "yes")).to_json())
        save_run(path / "other" / "good", plan)
        save_run(path / "finished" / "good", plan)
        save_tokenizer(path / "finished" / "good" / "model", 16, pad_token="[PAD]")
        (path / "finished" / "good" / "model" / "model.safetensors").write_bytes(b"torn")
        save_run(path / "damaged" / "good", "{")
        disable_progress_bars()  # as the command line has it, which starts before datasets do
        yield path
        enable_progress_bars()


@pytest.fixture
def masklock(place, monkeypatch, capfd) -> Run:
    """Run the command line in this process; returns exit code, stdout and stderr."""

    def masklock(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["masklock", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        return (ended.value.code or 0, *capfd.readouterr())

    return masklock


def files_of(place: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in place.rglob("*")}


def expect_refusal(masklock: Run, place: Path, arguments: list[str], words: list[str]) -> None:
    before = files_of(place)
    code, out, err = masklock(*arguments)
    assert (code, out) == (2, "")
    assert [word for word in words if word not in err] == [], err
    assert err.startswith("masklock: ")  # nothing of a library stands before it
    assert "Traceback" not in err
    assert files_of(place) == before


def test_the_configuration_that_the_cases_spoil_is_good(masklock):
    code, out, err = masklock("check", "good.yaml")
    assert (code, err) == (0, "")
    assert "16 train, 4 validation, 4 test rows, 2 classes" in out
    assert "No errors." in out


@pytest.mark.parametrize("name", SETTINGS)
def test_check_says_what_is_wrong_and_writes_nothing(masklock, place, name):
    overrides, words = SETTINGS[name]
    expect_refusal(masklock, place, ["check", "good.yaml", *overrides], words)


@pytest.mark.parametrize("name", ALSO_IN_TRAINING)
def test_training_says_it_too_and_writes_nothing(masklock, place, name):
    overrides, words = SETTINGS[name]
    expect_refusal(masklock, place, ["train", "good.yaml", *overrides], words)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_misses_and_writes_nothing(masklock, place, name):
    arguments, words = COMMANDS[name]
    expect_refusal(masklock, place, arguments, words)


def test_a_training_without_disk_for_a_checkpoint_does_not_start(masklock, place, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: 0)
    words = ["A checkpoint needs about", "runs/good", "Free some space", "another output_dir"]
    expect_refusal(masklock, place, ["train", "good.yaml"], words)


def test_a_tokenizer_without_padding_token_is_a_note(masklock):
    code, out, _ = masklock("check", "good.yaml", "model.tokenizer_name_or_path=unpadded")
    assert code == 0
    assert "no padding token: its end token '[END]' pads" in out


def test_ctrl_c_in_the_middle_of_a_check_ends_quietly(masklock, place, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(check_stage, "load_raw", interrupt)
    before = files_of(place)
    code, out, err = masklock("check", "good.yaml")
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert files_of(place) == before


def test_a_hub_that_does_not_answer_is_said_once(caplog):
    without_waiting_lines()
    library = logging.getLogger("huggingface_hub.utils._http")
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            library.warning("'unknown host' thrown while requesting HEAD https://hub")
            library.warning("Retrying in %ss [Retry %s/5].", number, number)
        library.warning("something else")
    assert len(caplog.messages) == 2
    assert "HF_HUB_OFFLINE=1" in caplog.messages[0]
