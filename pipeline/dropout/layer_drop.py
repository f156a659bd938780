"""LayerDrop: whole layers left out, by one decision a step.

Fan, Grave, Joulin, "Reducing Transformer Depth on Demand with Structured Dropout", ICLR 2020. A
stack's own draw is answered with "keep"; the layer itself is then left out by key, also in eval
mode (Monte-Carlo passes) and under ZeRO-3 and FSDP, where transformers runs all layers.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.dropout.decisions import over_rows
from pipeline.dropout.doors import replaced
from pipeline.errors import DropoutError

LAYER = "layer"
Seen = Callable[[str, float], None]
"""(layer, rate): a stack was about to draw for this layer."""
Decide = Callable[[str], Tensor | None]
"""Layer -> which rows leave it out, bool `[1]` or `[B]`; None where none does."""

_KEEP = 2.0  # above every rate
# The generators that stacks draw from, with the type of their answer.
_GENERATORS: tuple[tuple[Any, str, Callable[[float], Any]], ...] = (
    (torch, "rand", torch.tensor),
    (np.random, "random", float),
    (np.random, "uniform", float),
    (random, "uniform", float),
)


@contextmanager
def stacks_keep_layers(names: dict[nn.Module, str], seen: Seen) -> Iterator[None]:
    """While the block runs, a stack that draws for LayerDrop is told to keep the layer."""
    with ExitStack() as patches:
        for owner, name, answer in _GENERATORS:
            replacement = _replacement(getattr(owner, name), answer, names, seen)
            patches.enter_context(replaced(owner, name, replacement))
        yield


def _replacement(
    original: Any, answer: Callable[[float], Any], names: dict[nn.Module, str], seen: Seen
) -> Any:
    def draw(*args: Any, **kwargs: Any) -> Any:
        found = _layer_about_to_run(sys._getframe(1), names)
        if found is None:
            return original(*args, **kwargs)
        seen(*found)
        return answer(_KEEP)

    return draw


def _layer_about_to_run(frame: Any, names: dict[nn.Module, str]) -> tuple[str, float] | None:
    """The layer and rate of a stack's draw, from its loop `for layer in self.layers`."""
    attribute = next((n for n in frame.f_code.co_names if n.endswith("layerdrop")), None)
    stack = frame.f_locals.get("self")
    if attribute is None or not isinstance(stack, nn.Module) or stack not in names:
        return None
    rate: Any = getattr(stack if hasattr(stack, attribute) else stack.config, attribute)
    local = [value for value in frame.f_locals.values() if isinstance(value, nn.Module)]
    layers = [names[m] for m in local if m is not stack and m in names]
    return (layers[-1], float(rate)) if layers else None


def open_layers(names: dict[nn.Module, str], sites: set[str], decide: Decide) -> Callable[[], None]:
    """Let layers be left out by decision; returns the function that undoes it."""
    # The last of a name is the innermost: the layer itself, not what wraps it.
    layers = {name: module for module, name in names.items() if name in sites}
    returns_tensor: dict[type, bool] = {}
    for name, layer in layers.items():
        # On the object, not by hooks: it lies outside the checkpoint that wraps the class's own.
        layer.__dict__["forward"] = _forward(layer, name, decide, returns_tensor)

    def close() -> None:
        for layer in layers.values():
            del layer.__dict__["forward"]

    return close


def _forward(
    layer: nn.Module, name: str, decide: Decide, returns_tensor: dict[type, bool]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        is_dropped = decide(name)
        x = args[0] if args else kwargs["hidden_states"]
        may_skip = returns_tensor.get(type(layer), False) and not _must_run(layer, kwargs)
        if is_dropped is not None and may_skip and bool(is_dropped.all()):
            return left_out(x, layer)
        output = type(layer).forward(layer, *args, **kwargs)
        returns_tensor[type(layer)] = isinstance(output, Tensor)
        if is_dropped is None:
            return output
        if isinstance(output, Tensor):
            return _chosen(name, is_dropped, x, output)
        return (_chosen(name, is_dropped, x, output[0]), *output[1:])

    return forward


def _chosen(name: str, is_dropped: Tensor, x: Tensor, output: Tensor) -> Tensor:
    """The layer's input where it is left out; its parameters then get gradients of zero."""
    if x.shape != output.shape:
        raise DropoutError(
            f"Layer {name} turns a tensor of shape {tuple(x.shape)} into {tuple(output.shape)}: it "
            "cannot be left out for some rows, or under ZeRO-3 and FSDP; set its rate to 0."
        )
    return torch.where(over_rows(is_dropped, x), x, output)


def _must_run(layer: nn.Module, kwargs: dict[str, Any]) -> bool:
    """ZeRO-3 and FSDP reduce only the gradients of what ran; a cache counts tokens by layer."""
    is_sharded = hasattr(next(layer.parameters(), None), "ds_id") or any(
        base.__name__.startswith(("FSDPModule", "FullyShardedDataParallel"))
        for module in layer.modules()
        for base in type(module).__mro__
    )
    has_cache = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
    return is_sharded or (has_cache and not layer.training)


class _LeftOut(torch.autograd.Function):
    """The identity, which hands gradients of zero to the parameters that were not used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *(torch.zeros_like(p) for p in ctx.parameters)


def left_out(x: Tensor, layer: nn.Module) -> Tensor:
    """The input of a layer that is left out.

    Its parameters get gradients of zero, not none: DDP waits for all of them, ZeRO has zero where
    there is none, and an optimizer must do the same under every engine.
    """
    if not torch.is_grad_enabled():
        return x
    same: Tensor = _LeftOut.apply(x, *(p for p in layer.parameters() if p.requires_grad))
    return same
