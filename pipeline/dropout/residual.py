"""Stochastic depth drawn in a residual layer, without a module of its own (LeViT)."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from pipeline.dropout.doors import PATH, Draw


def is_residual(module: nn.Module) -> bool:
    """Whether a module adds `drop_rate`-dropped paths of its `module` to its input."""
    return type(module).__name__ == "LevitResidualLayer" and hasattr(module, "drop_rate")


def open_residuals(names: dict[nn.Module, str], draw: Draw) -> Callable[[], None]:
    """Route the paths of residual layers through `draw`; returns the function that undoes it."""
    undo: list[Callable[[], Any]] = []
    for layer, name in names.items():
        if is_residual(layer):
            rate: Any = layer.drop_rate
            layer.drop_rate = cast(Any, 0.0)  # its own draw; `draw` is asked about the path
            inner: Any = layer.module
            undo.append(inner.register_forward_hook(_hook(name, float(rate), draw)).remove)
            undo.append(partial(setattr, layer, "drop_rate", rate))

    def close() -> None:
        for action in undo:
            action()

    return close


def _hook(site: str, rate: float, draw: Draw) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return draw(PATH, site, output, rate if module.training else 0.0)

    return hook
