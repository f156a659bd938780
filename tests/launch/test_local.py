"""A job on this machine; and two nodes of a job, for real, on loopback."""

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from launch import job as jobs
from launch import local
from pipeline.errors import LayoutError

ROOT = Path(__file__).resolve().parents[2]


def test_one_process_is_a_plain_training(job):
    words = local.command(job())
    assert words[1:4] == ["-m", "pipeline", "train"]
    assert "--accelerate-config" not in words


def test_several_processes_take_the_preset(job):
    words = local.command(job(gpus_per_node=4))
    assert words[-4:] == ["--accelerate-config", "zero3", "--num-processes", "4"]


def test_several_machines_are_told_what_to_run_on_each(job):
    with pytest.raises(LayoutError, match="--machine_rank 1 --main_process_ip FIRST_NODE"):
        local.command(job(nodes=2))


def test_a_signal_reaches_the_training_and_its_exit_code_comes_back(job, monkeypatch):
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
    code += "print('ready', flush=True); signal.pause()"
    monkeypatch.setattr(local, "command", lambda job: [sys.executable, "-c", code])
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert local.submit(job()) == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.drill
@pytest.mark.timeout(300)
def test_two_nodes_train_one_model(job, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "RENDEZVOUS_PORT", free_port())
    steps = [f"train.{name}_steps=2" for name in ("max", "eval", "save")]
    spec = replace(
        job(nodes=2),
        config=str(ROOT / "configs/language/quickstart.yaml"),
        overrides=(*steps, f"output_dir={tmp_path}", "wandb.mode=disabled"),
    )
    preset = str(ROOT / "configs/accelerate/cpu.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = []
    for rank in ("0", "1"):
        words = spec.accelerate_words(preset, rank, "127.0.0.1")
        program = Path(sys.executable).with_name(words[0])
        nodes.append(subprocess.Popen([program, *words[1:]], env=environment))
    try:
        assert [node.wait(240) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert (tmp_path / "quickstart" / "model" / "adapter_model.safetensors").is_file()
