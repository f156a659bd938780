"""Judges windows of a run one after the other: the table of contents of monitoring."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from monitoring.alerts import Alert, utc_now
from monitoring.history import WindowRecord
from monitoring.scored import Window
from monitoring.sinks import Sink
from pipeline.config.schema import RunConfig
from pipeline.records import RunFolder

Clock = Callable[[], datetime]


@dataclass(frozen=True)
class MonitorOutcome:
    """What one window gave."""

    record: WindowRecord
    alerts: list[Alert]
    is_new: bool
    """False where this window had been judged before: nothing was recorded again."""


def monitor(
    run: RunFolder,
    config: RunConfig,
    window: Window,
    sinks: Mapping[str, Sink],
    now: Clock = utc_now,
) -> MonitorOutcome:
    """Judge one window, record it, raise and send alerts."""
    raise NotImplementedError
