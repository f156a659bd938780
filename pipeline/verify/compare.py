"""Compares what layouts left: pure functions of their records; the first difference by name.

Steps are counted from 0, as in `masklock mask --step`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any

from torch import Tensor, zeros

from pipeline.verify.probe import Digests

TOLERANCE = 1e-5
"""Relative: of a tensor's largest weight, of a step's gradient."""

Gradients = Mapping[str, Mapping[str, Tensor]]
"""step -> parameter -> gradient before clipping."""


@dataclass(frozen=True)
class Record:
    """One layout's run: masks and order over all its processes, losses, gradients, weights."""

    masks: Digests
    changed: list[str]
    losses: dict[str, float]
    weights: dict[str, Tensor]
    gradients: Gradients = field(default_factory=dict)
    """Empty where the engine does not show them."""


@dataclass(frozen=True)
class Outcome:
    """How a layout compares with the plain loop."""

    layout: str
    state: str
    """equal, differs, or failed: it did not run to its end."""
    masks: int
    """Masks compared."""
    gradient_difference: float | None
    weight_difference: float | None
    differences: tuple[str, ...]
    seconds: float

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.state == "equal"

    @classmethod
    def failed(cls, layout: str, reason: str, seconds: float) -> "Outcome":
        """Of a layout that did not run to its end."""
        return cls(layout, "failed", 0, None, None, (reason,), seconds)

    def to_json(self) -> dict[str, Any]:
        """As plain values; a difference that is no number is null."""
        numbers = {
            name: value if value is None or isfinite(value) else None
            for name, value in self.__dict__.items()
            if name.endswith("_difference")
        }
        return {
            **self.__dict__,
            **numbers,
            "equal": self.equal,
            "differences": list(self.differences),
            "seconds": round(self.seconds, 1),
        }

    def __str__(self) -> str:
        state = self.state if self.equal else self.state.upper()
        line = (
            f"{self.layout:<14} {state:<8} {self.masks:>7,} masks   "
            f"gradients {_shown(self.gradient_difference)}   "
            f"weights {_shown(self.weight_difference)}   {self.seconds:5.1f} s"
        )
        return "\n".join([line, *(f"    {difference}" for difference in self.differences)])


def _shown(difference: float | None) -> str:
    return f"{'-' if difference is None else f'{difference:.1e}':>7}"


def compare(
    name: str, found: Record, expected: Record, seconds: float, *, step_size: float = 0.0
) -> Outcome:
    """Everything in which a record differs, the first mask by step, site and sample.

    Args:
        step_size: how far one optimizer step can move a weight; see `weight_difference`.
    """
    gradient, gradient_where = gradient_difference(found.gradients, expected.gradients)
    weight, weight_where = weight_difference(found.weights, expected.weights, step_size)
    differences = [
        *(f"a recompute drew another mask: {where}" for where in found.changed[:1]),
        *order_differences(found.masks, expected.masks),
        *mask_differences(found.masks, expected.masks),
        *loss_differences(found.losses, expected.losses),
    ]
    for kind, difference, where in (
        ("gradients", gradient or 0.0, gradient_where),
        ("weights", weight, weight_where),
    ):
        if not difference <= TOLERANCE:  # NaN is no agreement
            differences.append(
                f"{kind} differ by {difference:.1e} relative (at most {TOLERANCE:g}), {where}"
            )
    state = "differs" if differences else "equal"
    count = sum(1 for _ in draws_of(found.masks))
    return Outcome(name, state, count, gradient, weight, tuple(differences), seconds)


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


def draws_of(masks: Digests) -> Iterator[tuple[str, str, str]]:
    """Step, site and sample of every draw: steps in order, sites as the model calls them."""
    for step in sorted(masks, key=int):
        for site, samples in masks[step].items():
            for sample in samples:
                yield step, site, sample


def mask_differences(found: Digests, expected: Digests) -> list[str]:
    """The first site, sample and step whose mask is another one, and how many there are."""
    different = [
        (place, "is another one" if _digest(found, place) else "was not drawn")
        for place in draws_of(expected)
        if _digest(found, place) != _digest(expected, place)
    ]
    different += [
        (place, "should not have been drawn")
        for place in draws_of(found)
        if not _digest(expected, place)
    ]
    if not different:
        return []
    (step, site, sample), how = different[0]
    return [f"{len(different):,} masks differ; step {step}, site {site}, sample {sample}: it {how}"]


def _digest(masks: Digests, place: tuple[str, str, str]) -> str | None:
    step, site, sample = place
    return masks.get(step, {}).get(site, {}).get(sample)


def loss_differences(found: Mapping[str, float], expected: Mapping[str, float]) -> list[str]:
    """The first step whose loss is not the same within rounding."""
    for step, loss in expected.items():
        other = found.get(step)
        if other is None or not abs(other - loss) <= 1e-4 * max(1.0, abs(loss)):
            return [f"the loss of step {step} is {other}, not {loss}"]
    return []


def gradient_difference(found: Gradients, expected: Gradients) -> tuple[float | None, str]:
    """Difference relative to a step's whole gradient, by norms, and where it is.

    The first step beyond the tolerance, else the worst; None where the engine shows none.
    """
    if not found:
        return None, ""
    worst = (0.0, "")
    for step, gradients in expected.items():
        parts = _parts(found.get(step, {}), gradients)
        whole = sum(float(value.double().square().sum()) for value in gradients.values()) ** 0.5
        difference = sum(part**2 for part in parts.values()) ** 0.5 / max(whole, 1e-30)
        name = max(parts, key=lambda name: (isnan(parts[name]), parts[name]))
        if not difference <= TOLERANCE:
            return difference, f"first in step {step}, most in {name}"
        worst = max(worst, (difference, f"in step {step}, most in {name}"))
    return worst


def _parts(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the difference by parameter; one without a gradient has a zero one."""
    parts = {}
    for name in sorted(found.keys() | expected.keys()):
        none = zeros((found[name] if name in found else expected[name]).shape)
        ours, theirs = found.get(name, none), expected.get(name, none)
        parts[name] = float((ours.double() - theirs.double()).norm())
    return parts


def weight_difference(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], step_size: float = 0.0
) -> tuple[float, str]:
    """Largest difference relative to a tensor's largest weight, and the tensor.

    Relative to `step_size` where that is larger: a bias that began at 0 and whose gradient is 0 in
    theory (that of attention's keys) holds nothing but rounding, moved by AdamW. Of tied weights,
    one tensor under several names in `expected`, one may be stored alone.
    """
    stored = {id(expected[name]) for name in found if name in expected}
    missing = {name for name in expected if id(expected[name]) not in stored}
    if names := sorted(missing | (found.keys() - expected.keys())):
        return float("inf"), f"{names[0]} is not in both"
    worst = (0.0, "")
    for name, weight in ((name, expected[name]) for name in found):
        scale = weight.abs().max().clamp(min=max(step_size, 1e-8))
        difference = float((found[name] - weight).abs().max() / scale)
        if isnan(difference):
            return difference, f"most in {name}"
        worst = max(worst, (difference, f"most in {name}"))
    return worst
