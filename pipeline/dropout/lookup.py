"""The mask of named coordinates of a run: what site, step and sample say, without model or data.

It draws by the kernels alone, so it also checks what a training or an evaluation drew.
"""

import difflib
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.dropout.concrete import saved_rates
from pipeline.dropout.decisions import dropped, masked_channels
from pipeline.dropout.kernels import attention, rows
from pipeline.dropout.key import STEP_ROW_ID, derive_key, row_id, signed
from pipeline.dropout.philox import scale, threshold
from pipeline.dropout.plan import DropoutPlan
from pipeline.dropout.schedules import Limits, done_at, rate_at
from pipeline.dropout.sites import SHARED, Site
from pipeline.dropout.variants import find_variant
from pipeline.errors import DropoutError
from pipeline.records import RunFolder


def mask_of_run(
    run: RunFolder,
    seed: int,
    index: int,
    site: str,
    sample: int,
    purpose: str,
    domain: str | None = None,
) -> dict[str, Any]:
    """The mask that a planned site draws for one sample, for the positions of the traced shape.

    Args:
        run: the run folder; its plan.json names the sites.
        seed: the run's seed.
        index: optimizer step (`train`) or Monte-Carlo pass (`mc`), from 0.
        site: name of the site, `NAME` or `NAME#call`.
        sample: sample id.
        purpose: `train` or `mc`.
        domain: the sample's data domain, where domains have rates of their own.

    Returns:
        The coordinates, the key, and `keep`: 1 where an element stays, nested as
        [positions][features], or [heads][queries][keys] for attention.
    """
    plan = DropoutPlan.read(run.plan)
    found = _find(plan, site)
    if domain is not None:
        _require_domain(plan, domain)
    if purpose == "mc" and not found.in_passes:
        raise DropoutError(f"{found.label} draws in training only: give --purpose train.")
    rate = _rate(plan, found, index, purpose, domain)
    if found.learned:
        rate = _learned_rate(run, found, purpose)
    key = derive_key(seed, purpose, index, found.variant, found.site, found.call)
    keep = _keep(found, key, sample, rate)
    return {
        **_coordinates(found, seed, purpose, index, sample),
        **({"domain": domain} if plan.domains else {}),
        **({"channels": dict(found.channels)} if found.channels else {}),
        "rate": rate,
        "key": f"{key:016x}",
        "threshold": threshold(rate),
        "scale": 1.0 if found.channels else scale(threshold(rate)),  # a channel is replaced
        "keep": keep.int().tolist(),
        "kept": int(keep.sum()),
    }


def masks_digest(run: RunFolder, seed: int, num_passes: int, samples: Iterable[int]) -> str:
    """sha256 over the masks of all Monte-Carlo passes for these samples, site by site.

    Like `mask_of_run`, for the positions of the traced shape.
    """
    plan, digest = DropoutPlan.read(run.plan), hashlib.sha256()
    ids = list(samples)
    for site in plan.in_passes():
        rate = _learned_rate(run, site, "mc") if site.learned else _rate(plan, site, 0, "mc", None)
        for index in range(num_passes):
            key = derive_key(seed, "mc", index, site.variant, site.site, site.call)
            for sample in ids:
                digest.update(_keep(site, key, sample, rate).numpy().tobytes())
    return digest.hexdigest()


def _find(plan: DropoutPlan, name: str) -> Site:
    found = [s for s in plan.in_force() if name in (s.site, s.label)]
    if not found:
        live = [s.label for s in plan.in_force()]
        near = difflib.get_close_matches(name, live, n=3) or live[:3]
        raise DropoutError(
            f"No site {name!r} is in force in this run's plan. {len(live)} are: {', '.join(near)}, "
            "... (`masklock plan RUN` lists them)."
        )
    if len(found) > 1:
        calls = ", ".join(f"{s.label} ({s.role})" for s in found)
        raise DropoutError(f"The site {name!r} draws more than once: {calls}. Name one of them.")
    return found[0]


def _require_domain(plan: DropoutPlan, domain: str) -> None:
    if domain not in plan.domains:
        known = ", ".join(plan.domains) or "none at all"
        raise DropoutError(
            f"No rates of the data domain {domain!r} are in this run's plan; it has those of "
            f"{known}. Leave the domain out for a row of any other one."
        )


def _coordinates(site: Site, seed: int, purpose: str, index: int, sample: int) -> Mapping[str, Any]:
    return {
        "seed": seed,
        "purpose": purpose,
        "index": index,
        "variant": site.variant,
        "site": site.site,
        "call": site.call,
        "role": site.role,
        "sample_id": sample,
    }


def _attention(site: Site, key: Tensor, row: Tensor, limits: Limits) -> Tensor:
    """`[heads, queries, keys]`, or `[windows, heads, queries, keys]`."""
    *windows, _, num_queries, num_keys = site.shape
    num_windows = math.prod(windows)
    first = torch.arange(num_windows)[:, None]
    queries, keys = (first * size + torch.arange(size) for size in (num_queries, num_keys))
    ones = torch.ones(num_windows, *site.shape[-3:])
    kept = attention(ones, key, row, queries, keys, *limits) > 0
    return kept.view(site.shape)


def _rate(plan: DropoutPlan, site: Site, index: int, purpose: str, domain: str | None) -> float:
    moves = purpose == "train" and site.progress != "constant"
    done = done_at(index, plan.num_steps, site.site) if moves else 1.0
    return rate_at(site, domain, done)


def _learned_rate(run: RunFolder, site: Site, purpose: str) -> float:
    if purpose == "train":
        raise DropoutError(
            f"The rate of {site.label} is learned: in training its mask is relaxed, not of zeros "
            "and ones. Look up a Monte-Carlo pass (--purpose mc)."
        )
    return saved_rates(run.model)[f"{site.site}#{site.call}"]


def _keep(site: Site, key: int, sample: int, rate: float) -> Tensor:
    if find_variant(site.variant).kernel == "noise":
        raise DropoutError(f"{site.label} adds noise: it has no mask.")
    key_row, sample_row = (torch.tensor([[signed(value)]]) for value in (key, row_id(sample)))
    limits = torch.tensor([[threshold(rate)]]), torch.ones(1, 1)
    variant = find_variant(site.variant)
    if variant.kernel == "spans":
        raise DropoutError(
            f"The spans of {site.label} depend on the length of each sample's audio, "
            "which a plan does not know."
        )
    if variant.whole_step or site.layout == SHARED:
        sample_row = torch.tensor([[signed(STEP_ROW_ID)]])
    if variant.kernel == "choice":
        rates = torch.tensor([own for _, own in site.channels], dtype=torch.float64)
        return ~masked_channels(key_row[0], sample_row[0], rates)[0]
    if variant.kernel == "scalar":
        return ~dropped(key_row[0], sample_row[0], torch.tensor([rate], dtype=torch.float64))
    if variant.kernel == "attention":
        return _attention(site, key_row, sample_row, limits)
    *places, features = site.shape
    length = math.prod(places)
    positions = torch.tensor([[variant.position(place) for place in range(length)]])
    ones, group = torch.ones(1, length, features), variant.group(features, site.block_size)
    return rows(ones, key_row, sample_row, positions, *limits, group)[0] > 0
