"""The shape of a retraining policy's YAML file; the string under a field is its documentation."""

import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from launch.retrain.schedule import never_fires
from pipeline.config.roles import PositiveInt, Section

Severity = Literal["info", "warning", "critical"]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
_PERFORMANCE = ("accuracy", "ece", "nll", "calibration_shift", "estimated_accuracy")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def duration(text: str) -> timedelta:
    """`30m`, `12h`, `7d` as a time span."""
    found = re.fullmatch(r"(\d+)([mhd])", text)
    if found is None:
        raise ValueError(
            f"a span is a whole number of minutes, hours or days, such as 30m, 12h or 7d; found {text!r}"
        )
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _is_span(text: str) -> str:
    duration(text)
    return text


class ScheduleTrigger(Section):
    """Retrain at least so often. Of turns that were missed, one is caught up on."""

    every: str | None = None
    """Time since the last retraining: `12h`, `30d`."""
    cron: str | None = None
    """Five fields of cron, in UTC: `0 3 * * 1` is Mondays at three."""

    @model_validator(mode="after")
    def _fires(self) -> "ScheduleTrigger":
        if (self.every is None) == (self.cron is None):
            raise ValueError("give exactly one of every and cron")
        if self.every is not None and not timedelta() < duration(self.every) < timedelta(days=3660):
            raise ValueError(f"every {self.every} never fires: give a span of 1m to 3659d")
        if self.cron is not None and (reason := never_fires(self.cron)):
            raise ValueError(reason)
        return self


class WindowsTrigger(Section):
    """k of the last n windows of monitoring."""

    at_least: PositiveInt = 2
    """k: windows that must tell the same, of the last n."""
    of_windows: PositiveInt = 3
    """n; windows that an earlier retraining has answered do not count."""

    @model_validator(mode="after")
    def _reachable(self) -> "WindowsTrigger":
        if self.at_least > self.of_windows:
            raise ValueError(
                f"at_least {self.at_least} of of_windows {self.of_windows} can never be reached"
            )
        return self


class DriftTrigger(WindowsTrigger):
    """Windows that raised an alert."""

    severity: Severity = "warning"
    """Alerts of at least this severity count."""


class KpiTrigger(WindowsTrigger):
    """A measure of the windows beyond a bound."""

    metric: str
    """`drift/performance/accuracy` (of windows with labels), `.../estimated_accuracy` (of all), `drift/COLUMN/mean`, ..."""
    below: float | None = None
    above: float | None = None

    @field_validator("metric")
    @classmethod
    def _namespace(cls, name: str) -> str:
        family, _, last = name.rpartition("/")
        if not name.startswith("drift/"):
            raise ValueError(f"{name} is no measure of a window: those begin with drift/")
        if family == "drift/performance" and last not in _PERFORMANCE:
            listed = ", ".join(_PERFORMANCE)
            raise ValueError(f"there is no {name}; of drift/performance/ there are {listed}")
        return name

    @model_validator(mode="after")
    def _bound(self) -> "KpiTrigger":
        if (self.below is None) == (self.above is None):
            raise ValueError("give exactly one of below and above")
        return self


class LabelsTrigger(Section):
    """New labelled rows in `data.new` since the last retraining."""

    rows: PositiveInt


class Triggers(Section):
    """What starts a retraining, each on its own; `--trigger manual` always does."""

    schedule: ScheduleTrigger | None = None
    drift: DriftTrigger | None = None
    labels: LabelsTrigger | None = None
    kpi: KpiTrigger | None = None


class DataPolicy(Section):
    """What a challenger is trained on: all new rows, and a share of the old ones."""

    new: list[str] = []
    """Files (patterns such as `labels/*.jsonl`) with labelled rows: parquet, CSV or JSON lines with the recipe's columns."""
    replay_share: Share = 1.0
    """Share of the old rows (the recipe's training rows, and new rows of promoted retrainings), drawn by key."""
    minimum_new_rows: Annotated[int, Field(ge=0)] = 0
    """With fewer usable new rows the retraining is rejected before it trains."""


class MetricGate(Section):
    """What the interval of challenger - champion must show."""

    margin: NonNegative = 0.0
    """How much worse the far end of the interval may be."""
    must: Literal["not_be_worse", "be_better"] = "not_be_worse"
    """`be_better`: the whole interval lies on the better side."""


class SliceGate(Section):
    """Slices by length, label, prediction and domain: none may be worse for certain."""

    margin: NonNegative = 0.0
    """A slice has regressed when its whole interval is worse than this; intervals of all slices hold together."""


class RetentionGate(MetricGate):
    """Rows of a skill that must not be lost, judged like a metric of quality."""

    files: list[str]
    """Labelled rows, as in `data.new`."""


class GatePolicy(Section):
    """When a challenger takes the champion's place: on the same frozen rows, with the same masks."""

    metrics: dict[str, MetricGate]
    """`accuracy`, `nll`, `ece` (or `nll`, `perplexity`), `ood/SET/SCORE`. Missing or NaN rejects."""
    slices: SliceGate | None = SliceGate()
    """null: slices are shown, not judged."""
    retention: dict[str, RetentionGate] = {}
    """Sets of rows by name."""
    num_resamples: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap resamples behind each interval."""
    confidence_level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of each interval."""


class WatchPolicy(WindowsTrigger):
    """The first windows after a promotion: bad ones bring the champion before it back."""

    at_least: PositiveInt = 2
    of_windows: PositiveInt = 3
    severity: Severity = "critical"
    """A window is bad with an alert of at least this severity."""
    within: str = "14d"
    """The watch ends after this span, with fewer windows too."""

    _span = field_validator("within")(_is_span)


class Limits(Section):
    """How often, how long, how stubbornly."""

    cooldown: str = "1d"
    """Nothing but `--trigger manual` starts a retraining so soon after the last one ended."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Failures of stages that are tried again before a retraining is given up."""
    backoff: str = "10m"
    """Wait after the first failure; doubled after each further one."""
    stage: str = "2d"
    """A stage that takes longer is stopped, which is a failure."""
    lease_seconds: Annotated[float, Field(ge=1)] = 300.0
    """A holder on another machine that has not been heard of for so long is dead."""

    _spans = field_validator("cooldown", "backoff", "stage")(_is_span)


class Policy(Section):
    """One line of models: how its champion is kept good."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the line; its state is in `work_dir/name`."""
    recipe: str
    """The run's YAML file that every challenger is trained with."""
    overrides: list[str] = []
    """`key=value` on top of it."""
    start_from: Literal["base", "champion"] = "base"
    """Weights a challenger starts from: the recipe's, or the champion's."""
    registry: str = "runs/registry"
    """The registry with the champion."""
    work_dir: str = "runs/retrain"
    """State (SQLite), data and logs of the retrainings."""
    history: str | None = None
    """Monitoring history to listen to; default: that of the champion's run."""
    accelerate_config: str | None = None
    """Train on several processes: a preset or file, as for `masklock train`."""
    num_processes: PositiveInt | None = None
    triggers: Triggers
    data: DataPolicy = DataPolicy()
    gate: GatePolicy
    watch: WatchPolicy | None = WatchPolicy()
    """null: no watch, no rollback by itself."""
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _pairs(self) -> "Policy":
        problems = []
        if self.triggers.labels is not None and not self.data.new:
            problems.append("triggers.labels never fires without data.new")
        if not self.gate.metrics:
            problems.append("gate.metrics is empty: name at least one, such as accuracy")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def facts(self) -> dict[str, Any]:
        """What decides the outcome of a retraining, for its key."""
        decisive = ("recipe", "overrides", "start_from", "data", "gate")
        return self.model_dump(mode="json", include=set(decisive))
