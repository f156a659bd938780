"""Models on the `meta` device: what can be known of one without weights and without data."""

import copy
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.dropout.doors import replaced

_VALUE_CHECK = "torch_compilable_check"


def without_value_checks(model: nn.Module) -> None:
    """Let a model compare no counts (image tokens with features): `meta` tensors have no values."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    checking = [file for file in files if hasattr(file, _VALUE_CHECK)]
    forward = model.forward

    def unchecked(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as patches:
            for file in checking:
                patches.enter_context(replaced(file, _VALUE_CHECK, lambda *args, **kwargs: None))
            return forward(*args, **kwargs)

    if checking:
        model.__dict__["forward"] = unchecked


def unread_parameters(model: Any, example: Callable[[], dict[str, Tensor]]) -> list[str]:
    """Names of the parameters that logits do not depend on: their gradient is always none.

    Args:
        model: a transformers model; its configuration and class alone are looked at.
        example: makes inputs on the `meta` device.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
        without_value_checks(twin)
        twin(**example()).logits.sum().backward()
    return [name for name, parameter in twin.named_parameters() if parameter.grad is None]
