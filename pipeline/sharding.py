"""Weights and optimizer states of sharded models as whole ones, by name, and back.

What leaves has the names and shapes of one process, so that any number of them can go on from it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import TrainingArguments

from pipeline import parallel

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


@contextmanager
def fsdp_on_any_device() -> Iterator[None]:
    """Let accelerate shard on a CPU too: while an Accelerator is made, processes count as GPUs'.

    Without it accelerate silently runs DistributedDataParallel there. Only its choice of engine is
    concerned: device, backend (gloo) and `fully_shard` itself stay those of the CPU.
    """
    state = PartialState._shared_state
    before = state.get("distributed_type")
    asks = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asks and before in (DistributedType.MULTI_CPU, DistributedType.FSDP):
        state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if state.get("distributed_type") == DistributedType.MULTI_GPU and before is not None:
            state["distributed_type"] = before


def classes_to_shard(model: nn.Module) -> list[str]:
    """The layers that are sharded one by one: those the model keeps whole, without its embeddings.

    accelerate shards the input embeddings by themselves; a class that holds them would be sharded
    twice, which `fully_shard` refuses.
    """
    embeddings = set(model.get_input_embeddings().modules())  # type: ignore[operator]
    whole = set(getattr(model, "_no_split_modules", None) or ())
    holders = {type(m).__name__ for m in model.modules() if embeddings & set(m.modules())}
    present = {type(m).__name__ for m in model.modules()}
    return sorted((whole & present) - holders)


def full_weights(model: nn.Module) -> dict[str, Any]:
    """Every weight, whole; on the main process only. All processes must call it."""
    return get_model_state_dict(model, options=_FULL)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights that a checkpoint holds in Hugging Face format into a (sharded) model."""
    found = [file for name in WEIGHTS if (file := folder / name).is_file()]
    files = found or sorted(folder.glob("model-*.safetensors"))
    weights = {name: value for file in files for name, value in load_file(file).items()}
    names = {_saved_name(name): name for name in model.state_dict()}
    wanted: dict[str, Any] = {
        names[name]: value for name, value in weights.items() if name in names
    }
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, wanted, options=options)


def _saved_name(name: str) -> str:
    """peft leaves the adapter's name out of what it saves."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, whole and by parameter name; on the main process only."""
    return get_optimizer_state_dict(model, optimizer, options=_FULL)


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> None:
    """Load a state saved by name (FSDP2) or by number (one process, DDP) into either."""
    state = dict(saved)
    if state["param_groups"] and not is_by_name(state):
        state = _by_name(state, _names_in_order(model, optimizer))
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def is_by_name(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state was saved by FSDP."""
    return any(isinstance(p, str) for group in state["param_groups"] for p in group["params"])


def _names_in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order of its groups: the order of numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    groups = [
        {**group, "params": [names[number] for number in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        "state": {names[number]: value for number, value in state["state"].items()},
        "param_groups": groups,
    }


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def use_one_device(args: TrainingArguments) -> str | None:
    """One process uses one device: nn.DataParallel would split a batch. A note where it matters."""
    visible = args.n_gpu
    if visible <= 1:
        return None
    args._n_gpu = 1
    return (
        f"{visible} devices are visible, but one process uses only the first. To use all: "
        f"accelerate launch --num_processes {visible} -m pipeline train CONFIG"
    )


def running_layout(args: TrainingArguments) -> parallel.Running:
    """The layout of the accelerator that the Trainer will make, before anything else exists."""
    kind = PartialState().distributed_type
    with fsdp_on_any_device():
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            deepspeed_plugin=args.deepspeed_plugin,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    running = parallel.Running.of(accelerator)
    AcceleratorState._reset_state()  # the Trainer makes its own, with its own plugins
    PartialState._shared_state["distributed_type"] = kind
    return running
