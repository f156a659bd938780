"""The doors through which dropout enters a model, opened so that all draws go through one function.

Nothing here knows about keys or masks: a draw function receives (door, site, tensor, rate) and
returns the tensor.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.dropout.key import canonical_site

Body = Callable[..., Any]
Draw = Callable[[str, str, Tensor, float], Tensor]
"""(door, site, tensor, rate of the call) -> masked tensor."""

MODULE, FUNCTIONAL, INSERTED, PATH = "module", "functional", "inserted", "path"


class _KeyedModule:
    """Mixin that gives an `nn.Dropout` a draw function in place of torch's generator."""

    masklock_draw: Draw
    masklock_site: str
    p: float

    def forward(self, input: Tensor) -> Tensor:
        return self.masklock_draw(MODULE, self.masklock_site, input, self.p)


class _KeyedPath:
    """The same for the `DropPath` of a modelling file (stochastic depth)."""

    masklock_draw: Draw
    masklock_site: str
    drop_prob: float | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.masklock_draw(PATH, self.masklock_site, hidden_states, self.drop_prob or 0.0)


@lru_cache(maxsize=64)
def _keyed_class(original: type[nn.Module], mixin: type) -> type[nn.Module]:
    # The class is swapped, not the module: hooks, ids, state_dict and isinstance survive.
    name = f"Keyed{original.__name__}"
    return type(name, (mixin, original), {"__module__": original.__module__})


class SiteRate:
    """A rate that carries its site: the modelling file hands it to `nn.functional.dropout`.

    `coordinates` draws for a kernel that masks by itself: (site, rate, query, number of keys) ->
    coordinates and first head, or None.
    """

    def __init__(
        self, site: str, draw: Draw, rate: float, coordinates: Callable[..., Any] | None = None
    ) -> None:
        self.site, self.draw, self.rate, self.coordinates = site, draw, rate, coordinates


def site_names(model: nn.Module) -> dict[nn.Module, str]:
    """Every module of a (possibly wrapped) model with its name in the bare model."""
    # The dot lets a name be recognised that is nothing but a wrapper: DDP's `module` is the root.
    return {m: canonical_site(f"{name}.").strip(".") for name, m in model.named_modules()}


def is_bound(names: dict[nn.Module, str]) -> bool:
    """Whether another draw function has opened this model's doors."""
    return any(isinstance(module, _KeyedModule | _KeyedPath) for module in names)


def is_path(module: nn.Module) -> bool:
    """Whether a module is a modelling file's `DropPath`."""
    return type(module).__name__.endswith("DropPath") and hasattr(module, "drop_prob")


def open_modules(names: dict[nn.Module, str], draw: Draw) -> Callable[[], None]:
    """Route every `nn.Dropout` and `DropPath` through `draw`; returns the undoing function."""
    swapped: list[nn.Module] = []
    for module, name in names.items():
        is_dropout = isinstance(module, nn.Dropout)
        if is_path(module) or (is_dropout and type(module).forward is nn.Dropout.forward):
            module.__dict__["masklock_draw"] = draw
            module.__dict__["masklock_site"] = name
            original: Any = type(module)
            mixin = _KeyedModule if is_dropout else _KeyedPath
            module.__class__ = _keyed_class(original, mixin)
            swapped.append(module)

    def close() -> None:
        for module in swapped:
            module.__class__ = type(module).__mro__[2]
            del module.__dict__["masklock_draw"], module.__dict__["masklock_site"]

    return close


def open_inserted(names: dict[nn.Module, str], sites: set[str], draw: Draw) -> Callable[[], None]:
    """Put a dropout on the output of the named modules; returns the function that undoes it."""

    def hook_for(site: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (draw(INSERTED, site, output[0], 0.0), *output[1:])
            return draw(INSERTED, site, output, 0.0)

        return hook

    # A wrapper has the name of what it wraps: the first of a name is the outermost.
    outermost = {name: module for module, name in reversed(names.items()) if name in sites}
    handles = [m.register_forward_hook(hook_for(name)) for name, m in outermost.items()]

    def close() -> None:
        for handle in handles:
            handle.remove()

    return close


@contextmanager
def open_functional(find: Callable[[nn.Module], tuple[str, Draw] | None]) -> Iterator[None]:
    """Route `nn.functional.dropout` through a draw function while the block runs.

    A `SiteRate` names its site. Otherwise it is the nearest caller whose `self` or `module` is a
    module that `find` knows; calls from elsewhere keep torch's own dropout.
    """

    def dropout(
        input: Tensor, p: float | SiteRate = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if isinstance(p, SiteRate):
            return p.draw(FUNCTIONAL, p.site, input, p.rate if training else 0.0)
        found = _calling_site(find)
        if found is None:
            return previous(input, p, training, inplace)
        site, draw = cast(tuple[str, Draw], found)
        return draw(FUNCTIONAL, site, input, p if training else 0.0)

    previous = nn.functional.dropout
    nn.functional.dropout = dropout
    try:
        yield
    finally:
        nn.functional.dropout = previous


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value while the block runs."""
    previous = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, previous)


def _calling_site(find: Callable[[nn.Module], Any]) -> Any:
    frame = sys._getframe(2)
    while frame is not None:
        variables = frame.f_locals
        for name in ("self", "module"):
            owner = variables.get(name)
            if isinstance(owner, nn.Module):
                found = find(owner)
                if found is not None:
                    return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def unsupported_modules(names: dict[nn.Module, str]) -> dict[str, str]:
    """Dropout modules with a rate that no door opens, by site, with the class that draws there."""
    return {
        name: type(module).__name__
        for module, name in names.items()
        if isinstance(module, nn.modules.dropout._DropoutNd)
        and not isinstance(module, _KeyedModule)
        and type(module).forward is not nn.Dropout.forward
        and module.p > 0
    }


_CHECKPOINT = "_gradient_checkpointing_func"


def wrap_checkpointing(modules: list[nn.Module], segment: Callable[[Body], Body]) -> None:
    """Let every checkpointed segment pass through `segment` (captures now, restores in recompute).

    Called at the start of each context: the Trainer installs its checkpointing function late.
    """
    for module in modules:
        function = getattr(module, _CHECKPOINT, None)
        if function is not None and not hasattr(function, "masklock_original"):
            setattr(module, _CHECKPOINT, _wrapped(function, segment))


def unwrap_checkpointing(modules: list[nn.Module]) -> None:
    """Give the modules their own checkpointing functions back."""
    for module in modules:
        original = getattr(getattr(module, _CHECKPOINT, None), "masklock_original", None)
        if original is not None:
            setattr(module, _CHECKPOINT, original)


def _wrapped(function: Body, segment: Callable[[Body], Body]) -> Body:
    def checkpoint(body: Body, *args: Any, **kwargs: Any) -> Any:
        return function(segment(body), *args, **kwargs)

    checkpoint.masklock_original = function  # type: ignore[attr-defined]
    return checkpoint


def in_backward() -> bool:
    """Whether this thread is inside autograd's backward."""
    # Under compilation there is no backward in Python, and the question would break the graph.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
