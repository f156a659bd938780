"""Compares what layouts left: pure functions of their records; the first difference by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.verify.probe import Digests

TOLERANCE = 1e-5  # relative, of the largest weight of a tensor


@dataclass(frozen=True)
class Record:
    """One layout's run: masks and order over all its processes, losses and final weights."""

    masks: Digests
    changed: list[str]
    losses: dict[str, float]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """How a layout compares with the first one."""

    layout: str
    equal: bool
    masks: int
    """Masks compared."""
    weight_difference: float | None
    differences: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "differences": list(self.differences)}

    def __str__(self) -> str:
        state = "equal" if self.equal else "DIFFERS"
        weights = "-" if self.weight_difference is None else f"{self.weight_difference:.1e}"
        line = (
            f"{self.layout:<16} {state:<8} {self.masks:>7,} masks   weights {weights:>8}   "
            f"{self.seconds:5.1f} s"
        )
        return "\n".join([line, *(f"    {difference}" for difference in self.differences)])


def compare(name: str, found: Record, expected: Record, seconds: float) -> Outcome:
    """Everything in which a record differs, the first mask by step, site and sample."""
    difference, worst = weight_difference(found.weights, expected.weights)
    differences = [
        *(f"a recompute drew another mask: {where}" for where in found.changed[:1]),
        *order_differences(found.masks, expected.masks),
        *mask_differences(found.masks, expected.masks),
        *loss_differences(found.losses, expected.losses),
    ]
    if difference > TOLERANCE:
        differences.append(
            f"weights differ by {difference:.1e} relative (at most {TOLERANCE:g}), most in {worst}"
        )
    count = sum(len(samples) for sites in found.masks.values() for samples in sites.values())
    return Outcome(name, not differences, count, difference, tuple(differences), seconds)


def order_differences(found: Digests, expected: Digests) -> list[str]:
    """The first step whose samples are not the same."""
    for step in sorted(expected, key=int):
        ours, theirs = samples_of(found.get(step, {})), samples_of(expected[step])
        if ours != theirs:
            missing, extra = sorted(theirs - ours)[:3], sorted(ours - theirs)[:3]
            return [f"step {step} visits other samples: {extra} in place of {missing}"]
    return []


def samples_of(sites: Mapping[str, Mapping[str, str]]) -> set[int]:
    """Ids of all samples that any site drew for."""
    return {int(sample) for samples in sites.values() for sample in samples}


def mask_differences(found: Digests, expected: Digests) -> list[str]:
    """The first site, sample and step whose mask is another one, and how many there are."""
    different = [
        f"step {step}, site {site}, sample {sample}"
        for step in sorted(expected, key=int)
        for site, samples in expected[step].items()
        for sample, digest in samples.items()
        if found.get(step, {}).get(site, {}).get(sample) != digest
    ]
    if not different:
        return []
    return [f"{len(different):,} masks differ, the first in {different[0]}"]


def loss_differences(found: Mapping[str, float], expected: Mapping[str, float]) -> list[str]:
    """The first step whose loss is not the same within rounding."""
    for step, loss in expected.items():
        other = found.get(step)
        if other is None or abs(other - loss) > 1e-4 * max(1.0, abs(loss)):
            return [f"the loss of step {step} is {other}, not {loss}"]
    return []


def weight_difference(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[float, str]:
    """Largest difference relative to a tensor's largest weight, and the tensor."""
    if found.keys() != expected.keys():
        names = sorted(found.keys() ^ expected.keys())
        return float("inf"), names[0]
    worst = (0.0, "")
    for name, weight in expected.items():
        scale = weight.abs().max().clamp(min=1e-8)
        worst = max(worst, (float((found[name] - weight).abs().max() / scale), name))
    return worst
