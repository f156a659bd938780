"""Presets, and what in a launch configuration contradicts a run."""

import json

import pytest
import yaml

from pipeline import engines
from pipeline.arguments import check_launch
from pipeline.config.schema import RunConfig
from pipeline.engines import Settings
from pipeline.errors import LayoutError

NAMES = ["cpu", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"]
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def config(**train):
    values = {"global_batch_size": 8, "per_device_train_batch_size": 2, **train}
    return RunConfig.model_validate(
        {
            "name": "run",
            "model": {"task": "text-classification", "model_type": "bert"},
            "data": {"path": "json"},
            "train": values,
        }
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_found_by_name_and_agrees_with_any_run(name):
    content = engines.read_preset(engines.find_preset(name))
    environment = {}
    if content["distributed_type"] == "DEEPSPEED":
        file = content["deepspeed_config"]["deepspeed_config_file"]
        environment = DEEPSPEED | {engines.DEEPSPEED_FILE: str(engines.ROOT / file)}
        assert f"zero{Settings.of(environment).deepspeed['zero_optimization']['stage']}" in name
    for train in ({}, {"bf16": True}, {"global_batch_size": 16, "max_grad_norm": 0.5}):
        check_launch(config(**train), Settings.of(environment), 2)


def test_there_is_a_preset_for_each_engine_and_no_other():
    assert sorted(path.stem for path in engines.PRESETS.glob("*.yaml")) == NAMES


def test_an_unknown_preset_lists_those_that_exist():
    with pytest.raises(LayoutError, match="zero9 is neither a file nor a preset.*cpu, ddp, fsdp2"):
        engines.find_preset("zero9")


def test_a_file_that_is_no_launch_configuration_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "run"}))
    with pytest.raises(LayoutError, match="does not say `distributed_type`"):
        engines.read_preset(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train_batch_size": 99}, "train_batch_size is 99 there, but 8 follows"),
        ({"train_micro_batch_size_per_gpu": 4}, "is 4 there, but 2 follows"),
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps is 7 there, but 2"),
        ({"gradient_clipping": 0.3}, "gradient_clipping is 0.3 there, but 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True there, but False"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: Masklock makes it from the train section"),
        ({"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_run_is_refused(tmp_path, content, words):
    (tmp_path / "deepspeed.json").write_text(json.dumps(content))
    environment = DEEPSPEED | {engines.DEEPSPEED_FILE: str(tmp_path / "deepspeed.json")}
    with pytest.raises(LayoutError, match=words):
        check_launch(config(), Settings.of(environment), 2)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision is bf16 there, but no"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, "steps is 3 there, but 2"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "5.0"}, "clipping is 5.0 there, but 1.0"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set train.gradient_checkpointing"),
    ],
)
def test_a_preset_that_contradicts_the_run_is_refused(environment, words):
    with pytest.raises(LayoutError, match=words):
        check_launch(config(), Settings.of(environment), 2)


def test_an_engine_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LayoutError, match=r"deepspeed is not installed.*\[deepspeed\]"):
        engines.require_engine("DEEPSPEED")
    engines.require_engine("FSDP")


def test_a_deepspeed_file_is_looked_for_here_and_in_the_checkout(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)
    environment = DEEPSPEED | {engines.DEEPSPEED_FILE: "configs/deepspeed/zero2.json"}
    engines.settle_environment(environment)
    assert environment[engines.DEEPSPEED_FILE] == str(engines.ROOT / "configs/deepspeed/zero2.json")
    with pytest.raises(LayoutError, match="neither in"):
        engines.settle_environment(DEEPSPEED | {engines.DEEPSPEED_FILE: "nowhere.json"})


def test_threads_are_shared_out_unless_the_user_has_said_how_many():
    assert engines.launch_environment(10_000, {})["OMP_NUM_THREADS"] == "1"
    assert engines.launch_environment(2, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
