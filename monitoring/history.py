"""The history of a run's windows in SQLite: what was judged, what was found, who was told.

One transaction a window holds its measures, the state of the sequential detectors, its alerts and
their deliveries still to make (an outbox): a process that dies leaves all of it or nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from monitoring.alerts import Alert, State

SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0
_TABLES = """
CREATE TABLE windows (
  id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, labelled INTEGER NOT NULL, created TEXT NOT NULL,
  num_rows INTEGER NOT NULL, outcome TEXT NOT NULL, body TEXT NOT NULL, UNIQUE (sha256, labelled));
CREATE TABLE detectors (name TEXT PRIMARY KEY, window INTEGER NOT NULL, state TEXT NOT NULL);
CREATE TABLE alerts (
  id TEXT PRIMARY KEY, window INTEGER NOT NULL REFERENCES windows (id), created TEXT NOT NULL,
  rule TEXT NOT NULL, about TEXT NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE deliveries (
  alert TEXT NOT NULL REFERENCES alerts (id), sink TEXT NOT NULL, state TEXT NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0, changed TEXT NOT NULL, error TEXT NOT NULL DEFAULT '',
  PRIMARY KEY (alert, sink));
CREATE TABLE refused (path TEXT PRIMARY KEY, size INTEGER, changed_ns INTEGER, reason TEXT);
"""

Outcome = Literal["quiet", "alert"]
DeliveryState = Literal["pending", "held", "repeat", "sent", "given up"]


@dataclass(frozen=True)
class WindowRecord:
    """One judged window."""

    sha256: str
    created: str
    num_rows: int
    outcome: Outcome
    labelled: bool = False
    model_version: str | None = None
    paths: list[str] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)
    """Numbers by key: `drift/<column>/<measure>`, `calibration/...`, `eval/...`."""
    details: dict[str, Any] = field(default_factory=dict)
    """The whole judgement, for pages."""
    id: int | None = None
    """Its place in the order of judging; given by the history."""


@dataclass(frozen=True)
class Delivery:
    """One alert on its way to one sink."""

    alert: str
    sink: str
    state: DeliveryState
    attempts: int = 0
    changed: str = ""
    error: str = ""


class History:
    """Opens, and if need be makes, the history at a path; a context manager.

    Raises:
        HistoryError: it is damaged, of a later version, locked for long, or the disk is full.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        raise NotImplementedError

    def add_window(
        self,
        record: WindowRecord,
        detectors: Mapping[str, Mapping[str, Any]] = {},
        alerts: Sequence[Alert] = (),
        deliveries: Sequence[Delivery] = (),
    ) -> int:
        """Record a window with all that follows from it, in one transaction; its id."""
        raise NotImplementedError

    def window(self, sha256: str, labelled: bool) -> WindowRecord | None:
        """The window of this content, if it was judged."""
        raise NotImplementedError

    def windows(self, limit: int | None = None) -> list[WindowRecord]:
        """The last `limit` windows in the order of judging, oldest first; all by default."""
        raise NotImplementedError

    def detector_state(self, name: str) -> dict[str, Any] | None:
        """State of a sequential detector after the last window; None before the first."""
        raise NotImplementedError

    def alerts(self, state: State | None = None, since: datetime | None = None) -> list[Alert]:
        """Alerts in the order they were raised, oldest first."""
        raise NotImplementedError

    def acknowledge(self, id: str, who: str, note: str, at: datetime) -> Alert:
        """Mark an alert as seen."""
        raise NotImplementedError

    def deliveries(self, state: DeliveryState | None = None) -> list[Delivery]:
        """Deliveries in the order of their alerts."""
        raise NotImplementedError

    def save_delivery(self, delivery: Delivery) -> None:
        """Record how far a delivery has come."""
        raise NotImplementedError
