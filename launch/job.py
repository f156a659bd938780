"""What is to run where, as plain values: a configuration and resources make a `JobSpec`.

Nothing is started or read here; local.py, slurm.py and kubernetes.py render what comes out.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.schema import RunConfig
from pipeline.errors import LayoutError

RENDEZVOUS_PORT = 29500
"""Where processes of several nodes meet, on the first of them."""

_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)")
_MEMORY = re.compile(r"[1-9]\d*[MGT]")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


@dataclass(frozen=True)
class Resources:
    """What one job takes of a machine or cluster."""

    nodes: int = 1
    gpus_per_node: int = 0
    """0: the CPU."""
    processes_per_node: int | None = None
    """Default: one a GPU, or one."""
    cpus_per_process: int = 4
    memory_per_node: str | None = None
    """Such as 64G; M, G or T are powers of 1024."""
    time_limit: str | None = None
    """[days-]hours:minutes:seconds."""

    @property
    def num_processes_per_node(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def num_processes(self) -> int:
        """Processes on all nodes together."""
        return self.nodes * self.num_processes_per_node

    @property
    def cpus_per_node(self) -> int:
        """Cores on each node."""
        return self.num_processes_per_node * self.cpus_per_process

    @property
    def seconds(self) -> int | None:
        """The time limit in seconds."""
        if self.time_limit is None or not (found := _TIME_LIMIT.fullmatch(self.time_limit)):
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class JobSpec:
    """One training as a scheduler sees it."""

    name: str
    config: str
    """The YAML file, as it is named where the job runs."""
    overrides: tuple[str, ...]
    preset: str
    """An accelerate configuration, by name or file."""
    resources: Resources
    secrets: tuple[str, ...]
    """Names of environment variables that must be there; their values are never written."""
    grace_seconds: int = 60
    """From the first warning to the end: enough to finish a step and save."""

    @property
    def train_words(self) -> tuple[str, ...]:
        """What follows `python -m pipeline`."""
        use_cpu = () if self.resources.gpus_per_node else ("train.use_cpu=true",)
        return ("train", self.config, *self.overrides, *use_cpu)

    def accelerate_words(self, preset_file: str, rank: str, host: str) -> list[str]:
        """`accelerate launch ...` for one node of several.

        Args:
            preset_file: the accelerate configuration, as a path where the job runs.
            rank: this node's number, or how the scheduler spells it.
            host: the first node, or how the scheduler spells it.
        """
        options = {
            "--config_file": preset_file,
            "--num_machines": str(self.resources.nodes),
            "--num_processes": str(self.resources.num_processes),
            "--machine_rank": rank,
            "--main_process_ip": host,
            "--main_process_port": str(RENDEZVOUS_PORT),
            "--dynamo_backend": "no",
        }
        words = [word for pair in options.items() for word in pair]
        return ["accelerate", "launch", *words, "--module", "pipeline", *self.train_words]


def job_of(
    config: RunConfig,
    source: str,
    overrides: Sequence[str],
    resources: Resources,
    preset: str,
    secrets: Sequence[str] = (),
    grace_seconds: int = 60,
) -> JobSpec:
    """The job that trains a configuration with these resources.

    Raises:
        LayoutError: with everything at once that would fail after the wait in a queue.
    """
    problems = [
        *_resource_problems(resources),
        *_batch_problems(config, resources),
        *(f"secret {name!r}: give the name of a variable" for name in secrets if not _named(name)),
    ]
    if grace_seconds < 10:
        problems.append(f"a warning of {grace_seconds} s is too short to save; give 10 or more")
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise LayoutError(f"The job for {config.name} cannot run:\n{lines}")
    online = ("WANDB_API_KEY",) if config.wandb.mode == "online" else ()
    return JobSpec(
        name=config.name,
        config=source,
        overrides=tuple(overrides),
        preset=preset,
        resources=resources,
        secrets=tuple(dict.fromkeys((*online, *secrets))),
        grace_seconds=grace_seconds,
    )


def _resource_problems(resources: Resources) -> list[str]:
    counts = {
        "nodes": resources.nodes,
        "processes per node": resources.num_processes_per_node,
        "CPUs per process": resources.cpus_per_process,
    }
    problems = [f"{name}: at least 1, not {n}" for name, n in counts.items() if n < 1]
    gpus, processes = resources.gpus_per_node, resources.num_processes_per_node
    if gpus < 0:
        problems.append(f"GPUs per node: at least 0, not {gpus}")
    if 0 < gpus != processes:
        problems.append(f"{processes} processes a node on {gpus} GPUs: one process takes one GPU")
    if resources.time_limit is not None and not resources.seconds:
        problems.append(f"time limit {resources.time_limit!r}: write [days-]hours:minutes:seconds")
    if resources.memory_per_node is not None and not _MEMORY.fullmatch(resources.memory_per_node):
        problems.append(f"memory {resources.memory_per_node!r}: write a number and M, G or T: 64G")
    return problems


def _batch_problems(config: RunConfig, resources: Resources) -> list[str]:
    """The global batch must divide into micro-batches of all processes."""
    processes, train = max(1, resources.num_processes), config.train
    share = processes * (train.per_device_train_batch_size or 1)
    if train.global_batch_size % share == 0:
        return []
    nearest = max(1, math.floor(train.global_batch_size / share + 0.5)) * share
    each = train.per_device_train_batch_size
    micro = f" with micro-batches of {each}" if each else ""
    return [
        f"train.global_batch_size {train.global_batch_size} does not divide over {processes} "
        f"processes{micro}; the nearest that does is {nearest}"
    ]


def _named(variable: str) -> bool:
    return _VARIABLE.fullmatch(variable) is not None
