"""The start-up guard, in one process with stand-ins, then with two real processes on loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import parallel
from pipeline.errors import LayoutError
from pipeline.parallel import Launch, Running

ROOT = Path(__file__).resolve().parents[2]


def test_launch_is_what_the_environment_says():
    environment = {"WORLD_SIZE": "4", "RANK": "2", "ACCELERATE_USE_FSDP": "true"}
    assert parallel.read_launch(environment) == Launch(world_size=4, rank=2, engine="FSDP")
    assert parallel.read_launch({}) == Launch(world_size=1, rank=0, engine="plain")


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


CHILD = """
import sys, torch
from transformers import TrainingArguments
from pipeline import parallel
from pipeline.errors import LayoutError
from pipeline.trainer import running_layout

launch = parallel.read_launch()
args = TrainingArguments(output_dir="unwritten", use_cpu=True, report_to="none")
parallel.guard(launch, args.world_size, running_layout(args))
assert parallel.agree_any(launch.rank == 1) and not parallel.agree_any(False)
assert parallel.sum_over_ranks(torch.tensor(launch.rank + 1)).item() == 3
assert parallel.from_main(launch.rank) == 0 and parallel.from_all(launch.rank) == [0, 1]
alone = TrainingArguments(output_dir="unwritten", use_cpu=False, report_to="none")
try:
    parallel.guard(launch, alone.world_size, running_layout(alone))
except LayoutError as error:
    sys.stderr.write(f"rank {launch.rank} refused with {error.exit_code}\\n")
"""


def test_two_processes_agree_and_refuse_to_train_as_two_worlds_of_one(tmp_path):
    """Without use_cpu, two processes on a machine without accelerator each see a world of one."""
    done = run_two(tmp_path, CHILD)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank} refused with 2" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["child.py"]


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
