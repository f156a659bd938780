"""A run goes on with another number of processes, or another engine, as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.errors import RunFolderError
from pipeline.train import train

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = 1e-6


@pytest.mark.parametrize("engine", ["zero2"])
@pytest.mark.usefixtures("needs_deepspeed")
def test_a_run_of_one_process_goes_on_with_two_and_passes_over_a_torn_save(folder, engine):
    name = f"then-two-{engine}"
    assert folder.train(name, engine=engine, num_processes=1).code == 0
    folder.back_to(name, 2)
    shards = folder.run(name) / "checkpoint-2" / "global_step2"
    next(shards.glob("*_optim_states.pt")).write_bytes(b"torn")
    ended = folder.train(name, engine=engine)
    assert ended.code == 0, ended.text
    assert "checkpoint-2 is passed over: global_step2/" in ended.text
    assert "Going on from runs/" in ended.text
    assert "moments begin anew" not in ended.text
    assert folder.distance(name) < ROUNDING


@pytest.mark.drill
@pytest.mark.parametrize("engine", ["cpu", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.usefixtures("needs_deepspeed")
def test_from_one_process_to_two_and_back_to_one(folder, engine):
    name = f"one-two-one-{engine}"
    assert folder.train(name, engine=engine, num_processes=1).code == 0
    for step, num_processes in ((1, 2), (2, 1)):
        folder.back_to(name, step)
        ended = folder.train(name, engine=engine, num_processes=num_processes)
        assert ended.code == 0, ended.text
        assert folder.distance(name) < ROUNDING


@pytest.mark.drill
@pytest.mark.parametrize(
    ("first", "then", "carries_optimizer"),
    [
        ("cpu", "fsdp2", True),
        ("fsdp2", "cpu", True),
        ("zero2", "zero1", True),
        ("zero2", "zero3", False),
        ("zero3", "cpu", False),
        ("cpu", "zero2", False),
        ("fsdp2", "zero3", False),
    ],
)
@pytest.mark.usefixtures("needs_deepspeed")
def test_from_one_engine_to_another(folder, first, then, carries_optimizer):
    name = f"{first}-{then}"
    assert folder.train(name, engine=first).code == 0
    folder.back_to(name, 2)
    ended = folder.train(name, engine=then)
    assert ended.code == 0, ended.text
    assert ("moments begin anew" in ended.text) is not carries_optimizer
    assert (folder.distance(name) < ROUNDING) is carries_optimizer


def test_another_global_batch_is_refused_unless_it_is_meant(folder, monkeypatch):
    monkeypatch.chdir(folder.path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert train(load_config("run.yaml", ["name=batch"])) == 0
    folder.back_to("batch", 2)
    changed, said = load_config("run.yaml", ["name=batch", "train.global_batch_size=4"]), []
    with pytest.raises(RunFolderError, match=r"global_batch_size: 8 -> 4[^$]*--allow-batch-change"):
        train(changed)
    assert train(changed, said.append, allow_batch_change=True) == 0
    assert any("The global batch changes from 8 to 4" in line for line in said)


@pytest.mark.drill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves_ends_with_75_and_the_run_goes_on(folder, number):
    name, long = f"stopped-{number.name}", "train.max_steps=4000"
    command = [sys.executable, "-m", "pipeline", "train", "run.yaml", f"name={name}", long]
    with subprocess.Popen(
        [*command, "train.save_steps=4000", "--accelerate-config", "cpu"],
        cwd=folder.path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        for line in launcher.stdout:
            if line.startswith("step 3/"):
                break
        launcher.send_signal(number)
        said = launcher.stdout.read()
    assert launcher.returncode == 75, said
    assert said.count("Stopped and saved after step") == 1
    (checkpoint,) = folder.run(name).glob("checkpoint-*")
    assert (checkpoint / "manifest.json").is_file()
