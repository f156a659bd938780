"""This process among the others: who it is, and the guard that refuses a layout nobody asked for.

The only place that reads ranks from the environment. No gradients pass through here, only scalars
and small objects.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from pipeline.errors import LayoutError

LONGEST_WAIT = timedelta(hours=6)
"""For a process that is slow; one that is gone is found out at once by pipeline/failure.py."""
ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DEEPSPEED", "ACCELERATE_USE_FSDP": "FSDP"}


@dataclass(frozen=True)
class Launch:
    """What the launcher asked for, as the environment tells it."""

    world_size: int = 1
    rank: int = 0
    engine: str = "plain"

    @property
    def is_main(self) -> bool:
        """Rank 0 speaks and writes for all."""
        return self.rank == 0


@dataclass(frozen=True)
class Running:
    """What accelerate made of it."""

    num_processes: int = 1
    engine: str = "plain"
    device: str = "cpu"

    @classmethod
    def of(cls, accelerator: Any) -> "Running":
        """Of an `accelerate.Accelerator`; one process and DDP are both plain."""
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        engine = kind if kind in ENGINES.values() else "plain"
        return cls(accelerator.num_processes, engine, accelerator.device.type)


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """The layout that torchrun, accelerate or deepspeed described in the environment."""
    asked = [engine for name, engine in ENGINES.items() if _is_on(environment.get(name, ""))]
    if len(asked) > 1:
        raise LayoutError("The environment asks for DeepSpeed and FSDP at once. Choose one engine.")
    world_size = _integer(environment, "WORLD_SIZE", 1)
    launch = Launch(world_size, _integer(environment, "RANK", 0), asked[0] if asked else "plain")
    if launch != Launch() and not environment.get("MASTER_ADDR"):
        raise LayoutError(
            f"The environment asks for {world_size} process(es) with {_named(launch.engine)}, but "
            "MASTER_ADDR, which every launcher sets, is not there. Nothing was written. Launch "
            "with torchrun or `accelerate launch`, or unset WORLD_SIZE, RANK and ACCELERATE_USE_*."
        )
    return launch


def guard(launch: Launch, args_world_size: int, running: Running) -> None:
    """Refuse to start unless world size and engine asked for are the ones running.

    Two processes that each believe to be alone would train two models and write them to one folder.
    """
    if not launch.world_size == args_world_size == running.num_processes:
        raise LayoutError(
            f"The launcher asked for {launch.world_size} processes (WORLD_SIZE), but the training "
            f"arguments see {args_world_size} and accelerate sees {running.num_processes}. "
            "Nothing was written. Without an accelerator leave train.use_cpu unset or true; "
            "otherwise check that every process sees a device, and launch with torchrun or "
            "`accelerate launch --num_processes N`."
        )
    if launch.engine != running.engine:
        raise LayoutError(
            f"The launcher asked for {_named(launch.engine)}, but {_named(running.engine)} is "
            f"running on {running.device}. Nothing was written. FSDP needs several accelerators; "
            "DeepSpeed needs the deepspeed package. Launch with another --accelerate-config, or "
            "with plain torchrun."
        )


def visible_devices(use_cpu: bool | None) -> int:
    """Accelerators that processes of this machine may take; 0: they run on the CPU."""
    return 0 if use_cpu or default_use_cpu() else torch.accelerator.device_count()


def require_devices(num_processes: int, num_devices: int) -> None:
    """Refuse more processes on this machine than it has accelerators.

    Args:
        num_processes: of this machine (LOCAL_WORLD_SIZE).
        num_devices: accelerators that are visible; 0: the processes run on the CPU.
    """
    if 0 < num_devices < num_processes:
        raise LayoutError(
            f"The launcher started {num_processes} processes on this machine, but only "
            f"{num_devices} accelerator(s) are visible. Nothing was written. Launch with "
            f"--num-processes {num_devices}, show more devices (CUDA_VISIBLE_DEVICES), or set "
            "train.use_cpu=true."
        )


def local_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Processes on this machine."""
    return _integer(environment, "LOCAL_WORLD_SIZE", 1)


def own_device(use_cpu: bool | None) -> torch.device:
    """The accelerator of this process among those of its machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or (default_use_cpu() if use_cpu is None else use_cpu):
        return torch.device("cpu")
    device = torch.device(accelerator.type, _integer(os.environ, "LOCAL_RANK", 0))
    torch.accelerator.set_device_index(device.index)
    return device


@contextmanager
def exchanging(launch: Launch) -> Iterator[None]:
    """Connect processes that share out rows and exchange results; their models know nothing of it.

    Where they are connected already, as in a training, they stay so.
    """
    if launch.world_size == 1 or _is_distributed():
        yield
        return
    torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def default_use_cpu() -> bool:
    """True without an accelerator: otherwise torchrun's processes do not find each other."""
    return not torch.accelerator.is_available()


def world_size() -> int:
    """Processes that train together."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """This process's number among them."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def is_main() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if _is_distributed():
        torch.distributed.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over all processes, on each of them."""
    if _is_distributed():
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
    return tensor


def agree_any(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is up on any process: one scalar all-reduce, the same answer everywhere."""
    if not _is_distributed():
        return flag
    votes = sum_over_ranks(torch.tensor([float(flag)], device=device))
    return bool(votes.item() > 0)


def from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    if not _is_distributed():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """One value of each process, in rank order, on every process."""
    if not _is_distributed():
        return [value]
    boxes: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(boxes, value)
    return boxes


def to_main(value: Any) -> list[Any]:
    """One value of each process, in rank order, on the main process; nothing on the others."""
    if not _is_distributed():
        return [value]
    boxes: list[Any] = [None] * world_size() if is_main() else []
    torch.distributed.gather_object(value, boxes if is_main() else None)
    return boxes


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process go through the block first, so that the others find its cache filled."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _named(engine: str) -> str:
    return {"DEEPSPEED": "DeepSpeed", "plain": "plain data parallelism"}.get(engine, engine)


def _is_on(value: str) -> bool:
    return value.strip().lower() in {"1", "true", "yes", "y", "on", "t"}


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "")
    if not value:
        return default
    if not value.isdigit():
        raise LayoutError(f"{name} in the environment must be a whole number, found {value!r}.")
    return int(value)
