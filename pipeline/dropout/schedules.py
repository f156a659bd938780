"""Rates that change: over the layers, over the steps, from one data domain to another.

A rate is a function of site, step and domain alone, so that a resumed run needs to know nothing of
the past.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.dropout.philox import scale, threshold
from pipeline.dropout.sites import Site
from pipeline.errors import DropoutError

Limits = tuple[Tensor, Tensor]
"""Thresholds int64 and scales float32, `[1, 1]` or one a row, `[B, 1]`."""

NO_DOMAIN = -1


def layer_of(site: str) -> tuple[str, int] | None:
    """The stack of layers that a site is in, and the layer's number; None outside of layers."""
    parts = site.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else (".".join(parts[:place]), int(parts[place]))


def layer_counts(sites: Iterable[str]) -> dict[str, int]:
    """Number of layers of each stack."""
    counts: dict[str, int] = {}
    for stack, layer in filter(None, map(layer_of, sites)):
        counts[stack] = max(counts.get(stack, 0), layer + 1)
    return counts


def depth_share(depth: str, site: str, counts: Mapping[str, int]) -> float:
    """Share of its role's rate that a site gets by its layer; 1 outside of layers.

    Linear: Huang et al., "Deep Networks with Stochastic Depth", 2016, from 0 at the first layer.
    """
    found = layer_of(site)
    if depth == "constant" or found is None:
        return 1.0
    stack, layer = found
    last = counts[stack] - 1
    if depth == "linear":
        return layer / last if last else 1.0
    from_edge = layer if depth == "early" else last - layer
    return float(3 * from_edge < counts[stack])


def progress_share(progress: str, gamma: float, done: float) -> float:
    """Share of its rate that a site has when `done` of the steps are done.

    Curriculum: Morerio et al., "Curriculum Dropout", 2017, equation 4, in keep rates
    (1 - p) exp(-gamma t) + p there, 1 - p that of the end.
    """
    if progress == "constant":
        return 1.0
    return done if progress == "linear" else 1 - math.exp(-gamma * done)


def done_at(index: int, num_steps: int | None, site: str) -> float:
    """Share of the steps that lie before step `index`."""
    if num_steps is None:
        raise DropoutError(
            f"The rate of {site} changes with progress, but the plan does not say how many steps "
            "there are. Give it with plan.for_steps(...)."
        )
    return min(index / num_steps, 1.0)


def rate_at(site: Site, domain: str | None, done: float) -> float:
    """A site's rate for one domain when `done` of the steps are done."""
    rate = dict(site.domains).get(domain or "", site.rate)
    return rate * progress_share(site.progress, site.gamma, done)


def limits_at(
    site: Site, done: Sequence[float], domains: Sequence[str], codes: Tensor | None
) -> Limits:
    """Thresholds and scales of the rows of a batch.

    Args:
        done: share of the steps done, one for all rows or one a row.
        domains: names of the domains, by code.
        codes: int64 `[B]`, each row's domain, NO_DOMAIN for none; None: none for all.
    """
    unique = sorted(set(done))
    names = [*domains, None]  # code -1 is the last
    table = [[threshold(rate_at(site, name, at)) for name in names] for at in unique]
    scales = [[scale(t) for t in row] for row in table]
    steps = torch.tensor([unique.index(at) for at in done])
    columns = torch.tensor([NO_DOMAIN]) if codes is None else codes.cpu()
    found = torch.tensor(table)[steps, columns], torch.tensor(scales)[steps, columns]
    return found[0][:, None], found[1].float()[:, None]
