"""Trains on this machine, in processes of its own: `masklock train` with a preset."""

import shlex
import signal
import subprocess
import sys
from typing import Any

from launch.job import JobSpec
from pipeline.errors import LayoutError


def command(job: JobSpec) -> list[str]:
    """The command that trains the job here.

    Raises:
        LayoutError: the job takes several machines.
    """
    if job.resources.nodes > 1:
        each = [shlex.join(job.accelerate_words(job.preset, str(rank), "FIRST_NODE"))
                for rank in range(job.resources.nodes)]  # fmt: skip
        raise LayoutError(
            f"local is one machine, but {job.resources.nodes} nodes were asked for. Use slurm or "
            "kubernetes, or run on the nodes, one line each:\n  " + "\n  ".join(each)
        )
    words = [sys.executable, "-m", "pipeline", *job.train_words]
    if job.resources.num_processes > 1:
        words += ["--accelerate-config", job.preset]
        words += ["--num-processes", str(job.resources.num_processes)]
    return words


def render(job: JobSpec) -> str:
    """The command as one line for a shell."""
    return shlex.join(command(job)) + "\n"


def submit(job: JobSpec) -> int:
    """Run it to its end; signals reach it, its exit code is handed on."""
    process = subprocess.Popen(command(job))

    def forward(number: int, frame: Any) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
