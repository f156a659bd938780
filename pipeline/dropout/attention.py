"""The door of attention dropout by transformers' own interface: `attn_implementation: keyed`.

The module that asks for attention names the site: no caller's frame is looked at, and a compiled
graph stays whole. The probabilities are those of the model's own eager function, with its position
bias, sinks and softcap; sites, call numbers and masks are those of `attn_implementation: eager`.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from pipeline.dropout import doors
from pipeline.dropout.doors import SiteRate
from pipeline.dropout.kernels import flash

KEYED = "keyed"
Attends = Callable[[str, float], SiteRate | float]
"""(site, rate of the call) -> what stands for the rate in the model's eager function."""

# Options that eager functions take no notice of: the mask has it, or it is for other modules.
_IGNORED = {"scaling", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache"}
_EAGER = "eager_attention_forward"
# A file that asks for "eager" by name does something there that no other name gets. GPT-2's only
# asks whether to reorder the products of a scaled score.
_ASKS_FOR_EAGER = re.compile(
    r'(?<!using_eager = self\.config\.)_attn_implementation (==|in|not in) [^\n]*"eager"'
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What `AttentionInterface` calls: softmax of the scores, their keyed mask, times the values.

    Args:
        module: the attention module; its name is the site.
        query: `[B, H, Q, D]`; key and value `[B, H or fewer, K, D]`.
        attention_mask: added to the scores, `[B or 1, 1 or H, Q, K]`.
        dropout: the rate of the call; that of the plan decides in a mask context.
        options: what the model's own eager function takes (scaling, position bias, sinks, ...).
    """
    owner: Any = module
    rate: SiteRate | float = dropout
    if hasattr(owner, "masklock_attends"):
        rate = owner.masklock_attends(owner.masklock_site, dropout)
        eager = owner.masklock_eager
    else:
        eager = eager_function(cast(Any, type(owner)))
    if isinstance(rate, SiteRate) and _may_be_fused(owner, query):
        fused = _fused(owner, rate, query, key, value, attention_mask, options)
        if fused is not None:
            return fused, None
    found: tuple[Tensor, Tensor | None]
    found = eager(module, query, key, value, attention_mask, dropout=rate, **options)
    return found


def _fused(
    module: Any,
    rate: SiteRate,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor | None:
    """The same by the fused kernel, `[B, Q, H, D]`; None where it cannot give what eager gives."""
    asked = {name for name, given in options.items() if given is not None and given is not False}
    if asked - _IGNORED or not flash.serves(query, value, mask):
        return None
    found = rate.coordinates and rate.coordinates(rate.site, rate.rate, query, key.shape[2])
    if found is None:
        return None
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    result = flash.flash_attention(query, key, value, mask, found[0], scaling, found[1])
    return result.transpose(1, 2).contiguous()


def _may_be_fused(module: Any, query: Tensor) -> bool:
    """Whether there is a kernel and the module's eager function is the kernel's; tried once."""
    if torch.compiler.is_compiling():  # what was found before, in eager calls
        return getattr(module, "masklock_plain", False)
    if not flash.ready(query.device):
        return False
    if "masklock_plain" not in vars(module):
        module.__dict__["masklock_plain"] = _is_plain(module, query)
    return bool(module.masklock_plain)


@torch.no_grad()
def _is_plain(module: Any, like: Tensor) -> bool:
    """Whether a module's eager function is softmax(q k^T * scaling + mask) v."""
    repeats = getattr(module, "num_key_value_groups", 1)
    heads, width = like.shape[1], like.shape[-1]
    shapes = ((heads, 3, width), (heads // repeats, 5, width), (heads // repeats, 5, width))
    options: dict[str, Any] = {"dtype": torch.float32, "device": like.device}
    q, k, v = (torch.arange(math.prod(s), **options).sin().view(1, *s) for s in shapes)
    mask = torch.arange(15, **options).cos().view(1, 1, 3, 5)
    nothing = SiteRate("", lambda door, site, x, rate: x, 0.0)
    with doors.open_functional(lambda owner: None):
        try:
            found = module.masklock_eager(module, q, k, v, mask, scaling=0.37, dropout=nothing)[0]
        except Exception:  # whatever an eager function of its own kind asks for
            return False
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    expected = torch.softmax(q @ k.mT * 0.37 + mask, -1) @ v
    same: bool = torch.allclose(found.float(), expected.transpose(1, 2), rtol=1e-2, atol=1e-3)
    return same


AttentionInterface.register(KEYED, attention_forward)
AttentionMaskInterface.register(KEYED, eager_mask)


def open_attention(names: dict[nn.Module, str], attends: Attends) -> Callable[[], None]:
    """Let every module that calls the interface ask `attends`; returns the undoing function."""
    opened = []
    for module, name in names.items():
        owner: Any = type(module)
        eager = eager_function(owner)
        if eager is not None:
            module.__dict__.update(
                masklock_attends=attends, masklock_site=name, masklock_eager=eager
            )
            opened.append(module)

    def close() -> None:
        for module in opened:
            for attribute in ("attends", "site", "eager", "plain"):
                module.__dict__.pop(f"masklock_{attribute}", None)

    return close


@lru_cache(maxsize=256)
def eager_function(owner: Any) -> Any:
    """The eager function that a class's methods hand to the interface; None where there is none."""
    for base in owner.__mro__:
        for method in vars(base).values():
            body = inspect.unwrap(method) if callable(method) else None
            if isinstance(body, FunctionType):
                found = [name for name in body.__code__.co_names if name.endswith(_EAGER)]
                if found:
                    return body.__globals__.get(found[0])
    return None


def uses_interface(model: nn.Module) -> bool:
    """Whether a model asks the interface for attention, and gives `eager` no part of its own."""
    classes: set[Any] = {type(module) for module in model.modules()}
    if getattr(getattr(model, "config", None), "reorder_and_upcast_attn", False):
        return False
    if any(_asks_for_eager(cls.__module__) for cls in classes if ".models." in cls.__module__):
        return False
    return any(eager_function(cls) is not None for cls in classes)


@lru_cache(maxsize=256)
def _asks_for_eager(file: str) -> bool:
    return _ASKS_FOR_EAGER.search(inspect.getsource(sys.modules[file])) is not None
