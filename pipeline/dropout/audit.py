"""Proves that a forward drew nothing outside the plan.

It watches torch's random operators, and compares the states of Python's and numpy's generators
before and after: whatever drew past the doors has no key, and could not be drawn again.
"""

import hashlib
import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.dropout.key import canonical_site


@dataclass(frozen=True)
class Leak:
    """Randomness that no key accounts for: where, and by which operator or generator."""

    site: str
    operator: str

    def __str__(self) -> str:
        return f"{self.site or 'the model'} ({self.operator})"


class _Watch(TorchDispatchMode):
    def __init__(self, names: dict[nn.Module, str], leaks: list[Leak]) -> None:
        super().__init__()
        self.names, self.leaks = names, leaks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_harmless(func, args, kwargs):
            owner = _calling_module(self.names)
            if not _is_idle_layer_drop(func, owner):
                name = self.names.get(owner, "") if owner is not None else ""
                leak = Leak(name, str(func))
                if leak not in self.leaks:
                    self.leaks.append(leak)
        return func(*args, **(kwargs or {}))


@contextmanager
def audited(names: dict[nn.Module, str] | nn.Module) -> Iterator[list[Leak]]:
    """Collect leaks while the block runs.

    Args:
        names: the model, or its modules with their names.
    """
    if isinstance(names, nn.Module):
        names = {module: canonical_site(name) for name, module in names.named_modules()}
    leaks: list[Leak] = []
    before = _host_generators()
    with _Watch(names, leaks):
        yield leaks
    after = _host_generators()
    leaks.extend(Leak("", name) for name in before if before[name] != after[name])


def _host_generators() -> dict[str, bytes]:
    states = {"random": random.getstate(), "numpy.random": np.random.get_state()}  # noqa: NPY002
    return {name: hashlib.sha256(pickle.dumps(state)).digest() for name, state in states.items()}


def _is_harmless(func: Any, args: Any, kwargs: Any) -> bool:
    """Fused attention and recurrent operators carry the tag even when asked to drop nothing."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "dropout", "p") and argument.type.kind() == "FloatType":
            value = args[place] if place < len(args) else None
            value = (kwargs or {}).get(
                argument.name, argument.default_value if value is None else value
            )
            return not value
    return False


def _is_idle_layer_drop(func: Any, owner: nn.Module | None) -> bool:
    """LayerDrop draws a scalar even at rate 0, and then ignores it."""
    rate = getattr(owner, "layerdrop", None)
    return func is torch.ops.aten.rand.default and rate is not None and not rate


def _calling_module(names: dict[nn.Module, str]) -> nn.Module | None:
    frame = sys._getframe(2)
    while frame is not None:
        for name in ("self", "module"):
            owner = frame.f_locals.get(name)
            if isinstance(owner, nn.Module) and owner in names:
                return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None
