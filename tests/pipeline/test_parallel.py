"""The start-up guard, in one process with stand-ins, then with two real processes on loopback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import parallel
from pipeline.config.load import load_config
from pipeline.errors import LayoutError
from pipeline.parallel import Launch, Running
from pipeline.records import read_jsonl
from pipeline.train import train

ROOT = Path(__file__).resolve().parents[2]


def test_launch_is_what_the_environment_says():
    environment = {"WORLD_SIZE": "4", "RANK": "2", "ACCELERATE_USE_FSDP": "true"}
    environment |= {"MASTER_ADDR": "127.0.0.1"}
    assert parallel.read_launch(environment) == Launch(world_size=4, rank=2, engine="FSDP")
    assert parallel.read_launch({}) == Launch(world_size=1, rank=0, engine="plain")


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "2"}, {"ACCELERATE_USE_DEEPSPEED": "true"}, {"RANK": "1"}]
)
def test_a_layout_that_no_launcher_set_up_is_refused(environment):
    with pytest.raises(LayoutError, match="MASTER_ADDR"):
        parallel.read_launch(environment)


def test_the_layout_asked_for_passes_the_guard():
    parallel.guard(Launch(2), 2, Running(2))
    parallel.guard(Launch(2, engine="DEEPSPEED"), 2, Running(2, "DEEPSPEED"))


@pytest.mark.parametrize(("args_world", "num_processes"), [(1, 1), (2, 1), (1, 2)])
def test_a_process_that_believes_to_be_alone_is_refused(args_world, num_processes):
    with pytest.raises(LayoutError, match="asked for 2 processes"):
        parallel.guard(Launch(2), args_world, Running(num_processes))


@pytest.mark.parametrize("asked", ["FSDP", "DEEPSPEED"])
def test_an_engine_that_silently_became_another_is_refused(asked):
    with pytest.raises(LayoutError, match="plain data parallelism is running on cpu"):
        parallel.guard(Launch(2, engine=asked), 2, Running(2))


def test_two_engines_at_once_are_refused():
    environment = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "1"}
    with pytest.raises(LayoutError, match="Choose one"):
        parallel.read_launch(environment)


def test_alone_every_agreement_is_ones_own_opinion():
    assert parallel.is_main()
    assert parallel.agree_any(True) is True
    assert parallel.from_all("me") == ["me"]
    assert parallel.from_main("me") == "me"


CONFIG = """
name: {name}
output_dir: runs
model:
  task: text-classification
  model_type: bert
  tokenizer_vocab_size: 300
  config_overrides: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
                      intermediate_size: 64, max_position_embeddings: 32}}
data: {{path: json, data_files: {files}, max_length: 16}}
train: {{global_batch_size: 8, per_device_train_batch_size: 2, max_steps: 4, logging_steps: 1,
         adam_epsilon: 1e-3, learning_rate: 1e-2, use_cpu: true, save_steps: 2}}
dropout: {{hidden: 0.2, attention: 0.1}}
wandb: {{mode: disabled}}
"""

CHILD = """
import sys, torch
from pipeline import parallel
from pipeline.config.load import load_config
from pipeline.config.load import load_config
from pipeline.errors import LayoutError
from pipeline.train import train

config = load_config("two.yaml")
assert train(config, lambda message: sys.stderr.write(message + "\\n")) == 0
launch = parallel.read_launch()
assert parallel.agree_any(launch.rank == 1) and not parallel.agree_any(False)
assert parallel.sum_over_ranks(torch.tensor(launch.rank + 1)).item() == 3
assert parallel.from_main(launch.rank) == 0 and parallel.from_all(launch.rank) == [0, 1]
try:
    train(load_config("two.yaml", ["name=refused", "train.use_cpu=false"]))
except LayoutError as error:
    sys.stderr.write(f"rank {launch.rank} refused with {error.exit_code}\\n")
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_as_one_and_refuse_to_train_as_two_worlds(tmp_path, monkeypatch):
    """Without use_cpu, two processes on a machine without accelerator each see a world of one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write_files(tmp_path)
    done = run_two(tmp_path, CHILD)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("The model of step 4 is in") == 1
    for rank in (0, 1):
        assert f"rank {rank} refused with 2" in done.stderr
    assert not Path("runs/refused").exists()
    train(load_config("one.yaml"))
    one, two = (load_file(f"runs/{name}/model/model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-6, rtol=1e-5)
    one, two = (losses(f"runs/{name}/metrics.jsonl") for name in ("one", "two"))
    assert two == [pytest.approx(value, rel=1e-5) for value in one]


def write_files(folder):
    rows = [{"text": f"word {n} of {n % 3}" * (1 + n % 3), "label": "ab"[n % 2]} for n in range(21)]
    for split in ("train", "validation", "test"):
        lines = "\n".join(json.dumps(row) for row in rows[: 21 if split == "train" else 5])
        (folder / f"{split}.jsonl").write_text(lines)
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(CONFIG.format(name=name, files=json.dumps(files)))


def losses(path):
    """Each step's training loss, and at the end the validation loss over a ragged share of rows."""
    return [row.get("train/loss", row.get("eval/loss")) for row in read_jsonl(path)]


def run_two(folder, code):
    (folder / "child.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", "child.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
