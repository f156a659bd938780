"""What starts a retraining: pure functions of what was seen, each with its evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from launch.retrain.evidence import WindowFact
from launch.retrain.policy import (
    DriftTrigger,
    KpiTrigger,
    LabelsTrigger,
    Policy,
    ScheduleTrigger,
    duration,
)
from launch.retrain.schedule import last_turn, next_turn
from pipeline.config.problems import nearest
from pipeline.errors import ConfigError

OF_PERFORMANCE = "drift/performance/"


@dataclass(frozen=True)
class Seen:
    """What there is to look at."""

    now: datetime
    since: datetime
    """When the last retraining began, or the champion was registered."""
    windows: Sequence[WindowFact] = ()
    """Windows that no retraining has answered, oldest first."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Rows of each file of new labels."""
    rows_before: Mapping[str, int] = field(default_factory=dict)
    """Rows that the last retraining saw there."""
    manual: int | None = None
    """Retrainings so far, where one is asked for by hand."""


@dataclass(frozen=True)
class Finding:
    """One trigger: whether it fires, on what, and the sentence for a reader."""

    trigger: str
    fires: bool
    said: str
    occasion: Any = None
    """What it fires on: the same occasion is retrained once."""
    evidence: dict[str, Any] = field(default_factory=dict)


def findings(policy: Policy, seen: Seen) -> list[Finding]:
    """Every trigger of the policy, the most pressing first."""
    triggers = policy.triggers
    found = [_manual(seen)] if seen.manual is not None else []
    if triggers.kpi is not None:
        found.append(_kpi(triggers.kpi, seen.windows))
    if triggers.drift is not None:
        found.append(_drift(triggers.drift, seen.windows))
    if triggers.labels is not None:
        found.append(_labels(triggers.labels, seen))
    if triggers.schedule is not None:
        found.append(_schedule(triggers.schedule, seen))
    return found


def new_rows(seen: Seen) -> int:
    """Rows that came since the last retraining; a file that shrank counts nothing."""
    return sum(max(0, rows - seen.rows_before.get(path, 0)) for path, rows in seen.rows.items())


def require_metric(trigger: KpiTrigger | None, windows: Sequence[WindowFact]) -> None:
    """Refuse a KPI that no window has: it would never fire. Those of labels may still come.

    Raises:
        ConfigError: with the nearest measure that there is.
    """
    if trigger is None or trigger.metric.startswith(OF_PERFORMANCE):
        return
    known = {name for window in windows for name in window.measures}
    if len(windows) >= trigger.of_windows and trigger.metric not in known:
        problem = (
            f"triggers.kpi.metric: none of the last {len(windows)} windows has "
            f"{trigger.metric}{nearest(trigger.metric, known)}"
        )
        raise ConfigError([problem], "retraining policy")


def _manual(seen: Seen) -> Finding:
    return Finding("manual", True, "asked for by hand", seen.manual)


def _kpi(trigger: KpiTrigger, windows: Sequence[WindowFact]) -> Finding:
    measured = [one for one in windows if trigger.metric in one.measures]
    last = measured[-trigger.of_windows :]
    values = {one.id: one.measures[trigger.metric] for one in last}
    bad = [one for one in last if _beyond(trigger, one.measures[trigger.metric])]
    bound = f"below {trigger.below}" if trigger.below is not None else f"above {trigger.above}"
    said = f"{trigger.metric} is {bound} in {len(bad)} of the last {len(last)} windows that have it"
    return _of_windows("kpi", bad, trigger.at_least, said, {"values": values})


def _beyond(trigger: KpiTrigger, value: float) -> bool:
    if trigger.below is not None:
        return value < trigger.below
    assert trigger.above is not None
    return value > trigger.above


def _drift(trigger: DriftTrigger, windows: Sequence[WindowFact]) -> Finding:
    last = windows[-trigger.of_windows :]
    bad = [one for one in last if one.is_at_least(trigger.severity)]
    said = (
        f"{len(bad)} of the last {len(last)} windows raised an alert ({trigger.severity} or above)"
    )
    return _of_windows("drift", bad, trigger.at_least, said, {})


def _of_windows(
    name: str, bad: Sequence[WindowFact], needed: int, said: str, evidence: dict[str, Any]
) -> Finding:
    evidence = evidence | {"windows": [one.to_json() for one in bad]}
    occasion = [one.sha256 for one in bad]
    return Finding(name, len(bad) >= needed, f"{said}; needs {needed}", occasion, evidence)


def _labels(trigger: LabelsTrigger, seen: Seen) -> Finding:
    count = new_rows(seen)
    said = f"{count} new labelled rows; needs {trigger.rows}"
    evidence = {"rows": dict(seen.rows), "before": dict(seen.rows_before)}
    return Finding("labels", count >= trigger.rows, said, dict(sorted(seen.rows.items())), evidence)


def _schedule(trigger: ScheduleTrigger, seen: Seen) -> Finding:
    every = None if trigger.every is None else duration(trigger.every)
    turn = last_turn(seen.now, seen.since, every, trigger.cron)
    if turn is None:
        due = next_turn(max(seen.now, seen.since), seen.since, every, trigger.cron)
        return Finding("schedule", False, f"next turn at {due:%Y-%m-%d %H:%M} UTC")
    said = f"the turn of {turn:%Y-%m-%d %H:%M} UTC is due"
    evidence = {"turn": turn.isoformat(), "since": seen.since.isoformat()}
    return Finding("schedule", True, said, turn.isoformat(), evidence)
