"""A router's jitter, keyed: uniform noise on the tokens that a mixture of experts is handed.

Fedus, Zoph, Shazeer, "Switch Transformers", JMLR 2022, section 2.4; arithmetic as in transformers:
x *= uniform(1 - eps, 1 + eps) before tokens are sent to their experts, so that each still stands at
its place. This is augmentation: in training only, never in Monte-Carlo passes.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.dropout.doors import Draw
from pipeline.dropout.sites import JITTER

_FIELDS = {"jitter_noise": 0.0, "input_jitter_noise": 0.0, "moe_jitter_eps": None}
"""Where modules keep eps (Switch, Mixtral, MiniMax; Phi-MoE; DBRX) -> what stands for none."""


def _field(module: nn.Module) -> str | None:
    return next((name for name in _FIELDS if getattr(module, name, None)), None)


def open_jitter(
    names: dict[nn.Module, str], draw: Draw, sites: Collection[str] | None = None
) -> Callable[[], None]:
    """Route the jitter of routers through `draw`; returns the function that undoes it.

    Args:
        names: modules by name.
        draw: receives the tokens `[B, T, D]` or `[B x T, D]`, in the router's type, and eps.
        sites: the modules that are routed; the others keep their own draw. Default: all.
    """
    undo: list[Callable[[], Any]] = []
    for module, name in names.items():
        field = _field(module)
        if field is not None and (sites is None or name in sites):
            eps = getattr(module, field)
            setattr(module, field, _FIELDS[field])
            hook = _hook(name, float(eps), draw)
            undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            undo.append(partial(setattr, module, field, eps))

    def close() -> None:
        for action in undo:
            action()

    return close


def _hook(site: str, eps: float, draw: Draw) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not module.training:
            return None
        tokens = args[0] if args else kwargs["hidden_states"]
        own_dtype = getattr(module, "dtype", None)  # Switch chooses experts in float32
        wide = tokens.to(own_dtype) if isinstance(own_dtype, torch.dtype) else tokens
        noisy = draw(JITTER, site, wide, eps)
        if args:
            return (noisy, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": noisy}

    return hook
