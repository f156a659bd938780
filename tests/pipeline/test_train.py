"""Whole trainings of models of a few thousand weights, against a plain torch loop written here."""

import json
import os
import shutil
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file

import pipeline.train
from pipeline import checkpoint
from pipeline.arguments import batch_split, check_optimizer, training_arguments
from pipeline.config.load import dump_config
from pipeline.config.schema import RunConfig
from pipeline.config.training import TrainConfig
from pipeline.data import load_raw, prepare_data
from pipeline.dropout.philox import permutation
from pipeline.errors import CheckpointError, ConfigError, NonFiniteLossError, RunFolderError
from pipeline.modality import MODALITIES
from pipeline.modality.tokenizer import load_tokenizer
from pipeline.model import build_model, plan_for
from pipeline.records import RunFolder, read_jsonl
from pipeline.train import train

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
LLAMA = BERT | {"num_key_value_heads": 1}
WORDS = {"animal": ["cat", "dog", "cow", "hen"], "colour": ["red", "blue", "green", "pink"]}


def write_rows(folder, num_rows=40):
    for split, count in (("train", num_rows), ("validation", 11), ("test", 3)):
        lines = [json.dumps(row(number)) for number in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


def row(number):
    label = list(WORDS)[number % 2]
    words = [WORDS[label][(number * 7 + place) % 4] for place in range(3 + number % 5)]
    return {"text": " ".join(words), "label": label}


def config_in(
    folder, name="run", task="text-classification", model=None, dropout=None, peft=None, **train_
):
    """A tiny run; further keyword arguments go to its train section."""
    kind, shape = ("bert", BERT) if task == "text-classification" else ("llama", LLAMA)
    origin = {"model_type": kind, "config_overrides": shape}
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    values = {"global_batch_size": 16, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    return RunConfig.model_validate(
        {
            "name": name,
            "output_dir": str(folder / "runs"),
            "seed": 2**63 + 5,
            "model": {"task": task, "tokenizer_vocab_size": 300} | (model or origin),
            "data": {"path": "json", "data_files": files, "max_length": 12},
            "train": values | {"use_cpu": True, "disable_tqdm": True} | train_,
            "dropout": {"hidden": 0.2} if dropout is None else dropout,
            "peft": peft,
            "wandb": {"mode": "disabled"},
        }
    )


@pytest.fixture(autouse=True, scope="module")
def without_wandb():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield


@pytest.fixture
def make_config(tmp_path):
    write_rows(tmp_path)
    return partial(config_in, tmp_path)


EVERY_TWO = {"eval_steps": 2, "save_steps": 2}


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """Data and a finished run of four steps, evaluated and saved every two."""
    folder = tmp_path_factory.mktemp("finished")
    write_rows(folder)
    assert train(config_in(folder, **EVERY_TWO)) == 0
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """A copy of that run to do anything to."""
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    return config_in(finished_once, **EVERY_TWO).model_copy(
        update={"output_dir": str(tmp_path / "runs")}
    )


def folder_of(config):
    return RunFolder(f"{config.output_dir}/{config.name}")


def weights_of(config):
    (file,) = folder_of(config).model.glob("*model.safetensors")
    return file.read_bytes()


def changed(config, **values):
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


# -- equal to a plain loop -----------------------------------------------------------------------


@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
@pytest.mark.parametrize("micro_batch", [16, 4])
def test_training_equals_a_plain_torch_loop(make_config, task, micro_batch):
    roles = ("embedding", "hidden", "attention", "head") if task == "text-classification" else ()
    config = make_config(
        task=task,
        dropout=dict.fromkeys(roles, 0.0),
        per_device_train_batch_size=micro_batch,
        weight_decay=0.01,
        adam_epsilon=1e-3,  # gradients that are zero but for rounding (biases of keys) stay small
    )
    assert train(config) == 0
    reference, losses = plain_loop(config)
    trained = load_file(folder_of(config).model / "model.safetensors")
    for name, value in trained.items():
        torch.testing.assert_close(value, reference[name], atol=2e-6, rtol=1e-5)
    logged = [
        row["train/loss"] for row in read_jsonl(folder_of(config).metrics) if "train/loss" in row
    ]
    assert logged == pytest.approx(losses, rel=1e-5)


def plain_loop(config):
    raw = load_raw(config)
    tokenizer = load_tokenizer(config, raw.train["text"])
    data = prepare_data(config, raw, tokenizer)
    plan = plan_for(config, data.label_names, tokenizer)
    model = build_model(config, data.label_names, plan, tokenizer).eval()
    collate = MODALITIES[config.model.task].collator(tokenizer, config)
    total, steps = config.train.global_batch_size, config.train.max_steps
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=1e-2, eps=1e-3)
    losses = []
    for step in range(steps):
        epoch, place = divmod(step, len(data.train) // total)
        order = permutation(config.seed, epoch, len(data.train))[place * total :][:total]
        batch = collate([data.train[int(number)] for number in order])
        labels = batch.pop("labels")
        batch.pop("sample_id")
        logits = model(**batch).logits
        if config.model.task == "text-generation":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.state_dict(), losses


def decay_groups(model, decay):
    """The usual split: biases and norms are not decayed."""
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        is_plain = name.endswith("bias") or "norm" in name.lower()
        (plain if is_plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def test_with_dropout_the_micro_batch_changes_nothing_but_rounding(make_config):
    one = make_config("one", dropout={"hidden": 0.3, "attention": 0.2})
    four = make_config(
        "four", dropout={"hidden": 0.3, "attention": 0.2}, per_device_train_batch_size=4
    )
    train(one)
    train(four)
    expected = load_file(folder_of(one).model / "model.safetensors")
    for name, value in load_file(folder_of(four).model / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], atol=5e-6, rtol=1e-4)


# -- before the update ---------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_row(
    make_config, tmp_path, monkeypatch
):
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[5] = json.dumps({"text": "Q cat dog", "label": "animal"})
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:16]))
    models = []

    def poisoned(config, label_names, plan, tokenizer):
        model = build_model(config, label_names, plan, tokenizer)
        (token,) = tokenizer("Q")["input_ids"]
        model.get_input_embeddings().weight.data[token] = float("nan")
        models.append((model, {name: value.clone() for name, value in model.state_dict().items()}))
        return model

    monkeypatch.setattr(pipeline.train, "build_model", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 1, for sample_id 5\. The update was not"):
        train(make_config())
    ((model, before),) = models
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


# -- stopping and going on -----------------------------------------------------------------------


def signalled_at(step):
    """A listener that sends this process a real SIGTERM when it hears of a step's log."""

    def say(message):
        if message.startswith(f"step {step}/") and "train/loss" in message:
            os.kill(os.getpid(), signal.SIGTERM)

    return say


def numbers(config):
    rows = read_jsonl(folder_of(config).metrics)
    return [
        {key: value for key, value in row.items() if key != "time" and "system/" not in key}
        for row in rows
    ]


def test_sigterm_saves_and_exits_75_and_the_same_command_ends_bit_equal(finished, make_config):
    config = make_config("stopped", **EVERY_TWO)
    assert train(config, signalled_at(2)) == 75
    assert not folder_of(config).model.exists()
    said = []
    assert train(config, said.append) == 0
    assert f"Going on from {folder_of(config).checkpoint(3)}." in said
    assert weights_of(config) == weights_of(finished)
    assert numbers(config) == numbers(finished)


def test_a_torn_checkpoint_is_passed_over_and_the_end_is_bit_equal(finished):
    expected = weights_of(finished), numbers(finished)
    shutil.rmtree(folder_of(finished).model)
    (folder_of(finished).checkpoint(4) / "optimizer.pt").write_bytes(b"torn")
    said = []
    assert train(finished, said.append) == 0
    assert any("checkpoint-4 is passed over: optimizer.pt is 4 bytes" in line for line in said)
    assert (weights_of(finished), numbers(finished)) == expected


def test_killed_between_last_checkpoint_and_model_only_the_model_is_written(finished):
    expected, rows = weights_of(finished), numbers(finished)
    shutil.rmtree(folder_of(finished).model)
    assert train(finished) == 0
    assert weights_of(finished) == expected
    assert numbers(finished) == rows


def test_a_complete_run_says_so_and_changes_nothing(finished):
    before, said = folder_of(finished).metrics.read_bytes(), []
    assert train(finished, said.append) == 0
    assert "is complete" in said[0]
    assert folder_of(finished).metrics.read_bytes() == before


def test_another_configuration_is_refused_with_the_difference(finished):
    with pytest.raises(RunFolderError, match=r"train\.learning_rate: 0\.01 -> 0\.5"):
        train(changed(finished, learning_rate=0.5))


def test_data_that_changed_since_the_checkpoint_are_refused(finished, finished_once):
    shutil.rmtree(folder_of(finished).model)
    moved = finished.data.data_files | {"train": str(folder_of(finished).path / "other.jsonl")}
    lines = (finished_once / "train.jsonl").read_text().replace("cat", "tac")
    (folder_of(finished).path / "other.jsonl").write_text(lines)
    config = finished.model_copy(
        update={"data": finished.data.model_copy(update={"data_files": moved})}
    )
    folder_of(finished).config.write_text(dump_config(config))
    with pytest.raises(RunFolderError, match="another data_fingerprint"):
        train(config)


def test_a_change_of_layout_or_logging_goes_on_and_takes_effect(finished):
    shutil.rmtree(folder_of(finished).model)
    shutil.rmtree(folder_of(finished).checkpoint(4))
    assert train(changed(finished, logging_steps=4, per_device_train_batch_size=8)) == 0
    steps = [row["step"] for row in numbers(finished) if "train/loss" in row]
    assert steps == [1, 2, 4]


def test_a_disk_that_fills_up_leaves_the_older_checkpoint(make_config, monkeypatch):
    config = make_config(save_steps=2)
    free = iter([10**12, 10**12])  # at the start, and for the first checkpoint
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: next(free, 1000))
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not .* checkpoint-2 is whole"):
        train(config)
    monkeypatch.undo()
    assert train(config) == 0


def test_a_folder_that_is_no_run_is_left_alone(make_config):
    config = make_config()
    folder = folder_of(config).path
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match=r"holds no config\.yaml"):
        train(config)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


# -- evaluation during training ------------------------------------------------------------------


def test_the_best_evaluation_survives_rotation_and_patience_and_becomes_the_model(make_config):
    """With the sign turned round the first evaluation stays the best; two more, and it is over."""
    config = make_config(
        max_steps=6,
        eval_steps=1,
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        early_stopping_patience=2,
        greater_is_better=True,
    )
    assert train(config) == 0
    steps = [row["step"] for row in numbers(config) if "eval/loss" in row]
    assert steps == [1, 2, 3]
    left = sorted(path.name for path in folder_of(config).path.glob("checkpoint-*"))
    assert left == ["checkpoint-1", "checkpoint-3"]
    best = folder_of(config).checkpoint(1) / "model.safetensors"
    assert weights_of(config) == best.read_bytes()


def test_a_validation_loss_counts_each_row_once_also_in_a_ragged_batch(finished, make_config):
    ragged = make_config("ragged", per_device_eval_batch_size=4, **EVERY_TWO)
    train(ragged)
    one, other = ([r for r in numbers(c) if "eval/loss" in r] for c in (ragged, finished))
    assert one == [pytest.approx(row, rel=1e-6) for row in other]


# -- what is left ---------------------------------------------------------------------------------


def test_nothing_in_a_run_folder_needs_unpickling_but_two_files_of_tensors(finished):
    names = {path.name for path in folder_of(finished).path.rglob("*") if path.is_file()}
    assert not names & {"training_args.bin", "rng_state.pth", "pytorch_model.bin"}
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(folder_of(finished).checkpoint(4) / name, weights_only=True)


def test_the_saved_model_loads_in_plain_transformers(finished):
    folder = folder_of(finished).model
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model(**tokenizer("cat dog", return_tensors="pt")).logits.shape == (1, 2)


def test_an_adapter_stops_goes_on_and_loads_in_plain_peft(finished, make_config):
    origin = {"model_name_or_path": str(folder_of(finished).model)}
    lora = {"model": origin, "peft": {"peft_type": "LORA", "r": 2, "lora_dropout": 0.1}}
    whole, stopped = make_config("whole", **lora), make_config("stopped", **lora)
    train(whole)
    assert train(stopped, signalled_at(1)) == 75
    assert train(stopped) == 0
    assert weights_of(stopped) == weights_of(whole)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder_of(whole).model)
    assert loaded.config.id2label == {0: "animal", 1: "colour"}


def test_metrics_come_under_their_namespaces(finished):
    first, second, evaluation = read_jsonl(folder_of(finished).metrics)[:3]
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(first)
    assert {"system/samples_per_second", "system/memory_mb"} <= set(first)
    assert second["train/epoch"] == 1.0
    assert second["train/global_step"] == second["step"] == 2
    assert {"eval/loss", "eval/accuracy", "eval/ece"} <= set(evaluation)


def test_bfloat16_trains_float32_weights(make_config):
    config = make_config(max_steps=1, bf16=True)
    assert train(config) == 0
    weights = load_file(folder_of(config).model / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"metric_for_best_model": "bleu"}, "'bleu' is not one of loss, accuracy or ece"),
        ({"lr_scheduler_type": "linaer"}, "linear"),
        ({"extra": {"gradient_accumulation_steps": 2}}, "train.global_batch_size"),
        ({"extra": {"optim_args": "nesterov=true"}}, "adamw_torch has no 'nesterov', it would be"),
        ({"optim": "sgd", "extra": {"optim_args": "momentum=fast"}}, "sgd refuses momentum=fast"),
        ({"optim": "sgd", "extra": {"optim_args": "momentum"}}, "momentum is no NAME=VALUE"),
        ({"fp16": True}, "float16 was asked for, but this run is on the CPU"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused_before_anything_is_written(
    make_config, values, words
):
    config = make_config(**values)
    with pytest.raises(ConfigError, match=words):
        train(config)
    assert not folder_of(config).path.exists()


def test_a_batch_that_does_not_divide_suggests_one_that_does():
    with pytest.raises(ConfigError, match="cannot be divided among 3 processes; use 15 or 18"):
        batch_split(TrainConfig(global_batch_size=16), 3)
    with pytest.raises(ConfigError, match="use one of 2, 4 or 8"):
        batch_split(TrainConfig(global_batch_size=16, per_device_train_batch_size=16), 2)
    assert batch_split(TrainConfig(global_batch_size=16, per_device_train_batch_size=2), 2) == (
        2,
        4,
    )


def test_arguments_that_an_optimizer_reads_are_accepted(make_config):
    extra = {"optim_args": "momentum=0.0, nesterov=false"}  # its own defaults
    arguments = training_arguments(make_config(optim="sgd", extra=extra), "unused", 1)
    check_optimizer(arguments)


@pytest.mark.drill
@pytest.mark.filterwarnings("ignore")  # what Dynamo thinks of libraries
def test_a_compiled_model_trains_as_an_uncompiled_one(make_config):
    weights = []
    for name, extra in (("plain", {}), ("compiled", {"torch_compile_backend": "eager"})):
        config = make_config(name=name, extra=extra)
        assert train(config) == 0
        weights.append(load_file(folder_of(config).model / "model.safetensors"))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6)
