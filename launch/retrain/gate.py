"""Whether a challenger takes the champion's place: a pure function of their comparison."""

import math
from dataclasses import dataclass
from typing import Any

from launch.retrain.policy import GatePolicy, MetricGate, RetentionGate
from monitoring.comparison import Comparison, Difference


@dataclass(frozen=True)
class Verdict:
    """Passed when there is no reason against it."""

    against: tuple[str, ...]
    """One sentence each."""
    checks: tuple[str, ...]
    """What was looked at."""

    @property
    def passed(self) -> bool:
        """Whether the challenger may be promoted."""
        return not self.against

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"passed": self.passed, "against": [*self.against], "checks": [*self.checks]}


def judge(comparison: Comparison, policy: GatePolicy, num_rows: int | None) -> Verdict:
    """Hold b (the challenger) against a (the champion).

    Args:
        num_rows: frozen rows that both must have been judged on; None where rows are no samples.
    """
    against = list(_unfit(comparison, num_rows))
    checks = [f"{comparison.num_rows} frozen rows, {comparison.fingerprint[:16]}"]
    for name, gate in policy.metrics.items():
        _check(comparison, name, gate, against, checks)
    for name, gate in policy.retention.items():
        for metric in _retained(comparison, name):
            _check(comparison, metric, gate, against, checks)
    if policy.slices is not None:
        margin = policy.slices.margin
        for one in comparison.slices:
            if _best(one) < -margin:
                against.append(f"{_shown(one)}: this slice is worse for certain")
        checks.append(f"{len(comparison.slices)} slices, margin {margin:g}")
    return Verdict(tuple(against), tuple(checks))


def _unfit(comparison: Comparison, num_rows: int | None) -> list[str]:
    """Why the comparison itself does not count."""
    reasons = []
    if num_rows is not None and comparison.num_rows != num_rows:
        reasons.append(f"both were judged on {comparison.num_rows} of the {num_rows} frozen rows")
    if comparison.num_unpaired or not comparison.same_masks:
        reasons.extend(comparison.notes)
    return reasons


def _retained(comparison: Comparison, name: str) -> list[str]:
    """The metric that says whether a skill was kept: the first of its metrics of quality."""
    prefix = f"retention/{name}/"
    names = [one.metric for one in comparison.metrics if one.metric.startswith(prefix)]
    return names[:1] or [f"{prefix}accuracy"]


def _check(
    comparison: Comparison,
    name: str,
    gate: MetricGate | RetentionGate,
    against: list[str],
    checks: list[str],
) -> None:
    found = comparison.metric(name)
    if found is None:
        reason = comparison.missing.get(name, "neither run was measured by it")
        against.append(f"{name} is missing: {reason}")
        return
    checks.append(_shown(found))
    if not all(map(math.isfinite, (found.a, found.b, found.lower, found.upper))):
        against.append(f"{name} is not a finite number")
    elif gate.must == "be_better" and not _worst(found) > 0:
        against.append(f"{_shown(found)}: it must be better for certain")
    elif gate.must == "not_be_worse" and _worst(found) < -gate.margin:
        against.append(f"{_shown(found)}: it may be worse by more than {gate.margin:g}")


def _worst(found: Difference) -> float:
    """The end of the interval that speaks against the challenger; above 0 is better."""
    return found.lower if found.higher_is_better else -found.upper


def _best(found: Difference) -> float:
    return found.upper if found.higher_is_better else -found.lower


def _shown(found: Difference) -> str:
    return (
        f"{found.metric} {found.a:.4f} -> {found.b:.4f} "
        f"({found.estimate:+.4f}, {found.lower:+.4f} to {found.upper:+.4f})"
    )
