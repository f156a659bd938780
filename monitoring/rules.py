"""Threshold, change and k-of-n rules over the measures of windows: pure functions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from monitoring.history import WindowRecord
from monitoring.measures import rows_behind
from pipeline.config.monitoring import BUILT_IN_RULES, RuleConfig

NUM_BASELINE_WINDOWS = 10
"""Windows before a window whose mean is its baseline, for `baseline: previous`."""
MIN_BASELINE_WINDOWS = 3


@dataclass(frozen=True)
class Finding:
    """A rule that a window broke."""

    rule: str
    metric: str
    value: float
    said: str
    """What is wrong, with the numbers."""
    baseline: float | None
    broken_in: int
    """How many of the windows looked at broke the rule, this one among them."""
    looked_at: int


def broken_rules(
    rules: Mapping[str, RuleConfig],
    windows: Sequence[WindowRecord],
    reference: Mapping[str, float],
) -> list[Finding]:
    """Rules that the last of the windows breaks, a rule once for every measure it matches.

    Args:
        rules: by name.
        windows: oldest first; the last one is judged, those before are its past.
        reference: measures of the reference profile.
    """
    current = windows[-1]
    return [
        finding
        for name, rule in rules.items()
        if rule.enabled
        for metric in matching(rule, current.measures)
        if _has_enough_rows(rule, metric, current)
        if (finding := _judge(name, rule, metric, windows, reference)) is not None
    ]


def silent_rules(rules: Mapping[str, RuleConfig], window: WindowRecord) -> list[str]:
    """Names of rules, the built-in ones left out, that no measure of this window is about."""
    return [
        name
        for name, rule in rules.items()
        if rule.enabled and name not in BUILT_IN_RULES and not matching(rule, window.measures)
    ]


def matching(rule: RuleConfig, measures: Mapping[str, float]) -> list[str]:
    """The measures that a rule is about."""
    return [key for key in measures if fnmatchcase(key, rule.metric)]


def _judge(
    name: str,
    rule: RuleConfig,
    metric: str,
    windows: Sequence[WindowRecord],
    reference: Mapping[str, float],
) -> Finding | None:
    values = [
        window.measures[metric]
        for window in windows
        if metric in window.measures and _has_enough_rows(rule, metric, window)
    ]
    first = max(0, len(values) - rule.of_windows)
    baselines = [
        _baseline(rule, values[:place], reference.get(metric))
        for place in range(first, len(values))
    ]
    faults = [
        _fault(rule, value, baseline)
        for value, baseline in zip(values[first:], baselines, strict=True)
    ]
    broken_in = sum(fault is not None for fault in faults)
    if faults[-1] is None or broken_in < rule.in_windows:
        return None
    said = f"{metric} is {values[-1]:.4g}, {faults[-1]}"
    if rule.of_windows > 1:
        said += f", in {broken_in} of the last {len(faults)} windows"
    return Finding(name, metric, values[-1], said, baselines[-1], broken_in, len(faults))


def _has_enough_rows(rule: RuleConfig, metric: str, window: WindowRecord) -> bool:
    return rows_behind(window.measures, metric, window.num_rows) >= rule.min_rows


def _baseline(rule: RuleConfig, before: Sequence[float], reference: float | None) -> float | None:
    if rule.baseline == "reference":
        return reference
    if len(before) < MIN_BASELINE_WINDOWS:
        return None
    recent = before[-NUM_BASELINE_WINDOWS:]
    return math.fsum(recent) / len(recent)


def _fault(rule: RuleConfig, value: float, baseline: float | None) -> str | None:
    """How a value breaks a rule, None where it does not."""
    return next(_faults(rule, value, baseline), None)


def _faults(rule: RuleConfig, value: float, baseline: float | None) -> Iterator[str]:
    if rule.above is not None and value > rule.above:
        yield f"above {rule.above:.4g}"
    if rule.below is not None and value < rule.below:
        yield f"below {rule.below:.4g}"
    if baseline is None:
        return
    name = {"reference": "the reference's", "previous": "the previous windows'"}[rule.baseline]
    for share, sign, word in ((rule.rises_by, 1, "above"), (rule.falls_by, -1, "below")):
        if share is not None and sign * (value - baseline) > share * abs(baseline):
            yield f"more than {share:.4g} of it {word} {name} {baseline:.4g}"
