"""Which linear layers stand next to a dropout site: tensors followed through one forward."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pipeline.dropout import doors
from pipeline.dropout.concrete import is_linear
from pipeline.dropout.sites import SAMPLE_FIRST, Site
from pipeline.dropout.trace import opened

SiteCall = tuple[str, str, int]


def linear_neighbours(
    model: nn.Module, inputs: Mapping[str, Any], inserted: Collection[str]
) -> dict[SiteCall, tuple[str, ...]]:
    """Names of the layers that read a site's output as it is; else of the one that made its input.

    Args:
        model: a model on any device, `meta` included.
        inputs: arguments of its forward.
        inserted: names of modules whose output gets an inserted site.
    """
    names, alive, counts = doors.site_names(model), list[Tensor](), dict[tuple[str, str], int]()
    made: dict[int, str] = {}  # tensor -> the linear layer that made it
    drawn: dict[int, SiteCall] = {}  # tensor -> the site that let it through
    behind: dict[SiteCall, tuple[str, ...]] = {}
    before: dict[SiteCall, tuple[str, ...]] = {}

    def draw(door: str, site: str, x: Tensor, rate: float) -> Tensor:
        call = (door, site, counts.get((door, site), 0))
        counts[door, site] = call[2] + 1
        behind[call] = (made[id(x)],) if id(x) in made else ()
        out = x.view_as(x) if x.dim() else x
        drawn[id(out)] = call
        alive.extend((x, out))  # while a tensor lives its id is its own
        return out

    def reads(module: nn.Module, args: tuple[Any, ...]) -> None:
        call = drawn.get(id(args[0])) if args else None
        if call is not None:
            before[call] = (*before.get(call, ()), names[module])

    def makes(module: nn.Module, args: Any, out: Tensor) -> None:
        alive.append(out)
        made[id(out)] = names[module]

    linears = [module for module in names if is_linear(module)]
    handles = [module.register_forward_pre_hook(reads) for module in linears]
    handles += [module.register_forward_hook(makes) for module in linears]
    try:
        with opened(names, set(inserted), draw):
            model.train()(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {call: before.get(call) or made_by for call, made_by in behind.items()}


def with_linears(
    sites: Sequence[Site], found: Mapping[SiteCall, tuple[str, ...]]
) -> tuple[Site, ...]:
    """The learned sites with their layers."""
    return tuple(
        replace(site, linears=found.get((site.door, site.site, site.call), ()))
        if site.learned
        else site
        for site in sites
    )


def learning_problems(sites: Sequence[Site]) -> list[str]:
    """The sites that cannot learn, by name."""
    problems = []
    for site in sites:
        name = f"{site.site}#{site.call}"
        if site.learned and (site.variant not in ("element", "channel") or not site.shape):
            problems.append(
                f"site {name} (variant {site.variant}) cannot learn its rate: concrete dropout "
                "knows the variants element and channel. Give it a rate that is set."
            )
        elif site.learned and (not site.linears or site.layout != SAMPLE_FIRST):
            problems.append(
                f"site {name} cannot learn its rate: no linear layer reads its output or makes its "
                "input, so concrete dropout has no weights to weigh the rate against. Give it a "
                f'rate that is set (dropout.overrides: {{"{name}": {site.rate:g}}}).'
            )
    return problems
