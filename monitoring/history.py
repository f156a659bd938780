"""The history of a run's windows in SQLite: what was judged, what was found, who was told.

One transaction a window holds its measures, the state of the sequential detectors, its alerts and
their deliveries still to make (an outbox): a process that dies leaves all of it or nothing.
"""

import dataclasses
import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from monitoring.alerts import Alert, State, stamp
from monitoring.database import Database
from pipeline.errors import DataError

SCHEMA_VERSION = 1
_TABLES = """
CREATE TABLE windows (
  id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, labelled INTEGER NOT NULL, created TEXT NOT NULL,
  outcome TEXT NOT NULL, body TEXT NOT NULL, UNIQUE (sha256, labelled)
) STRICT;
CREATE TABLE detectors (name TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT;
CREATE TABLE alerts (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created TEXT NOT NULL, state TEXT NOT NULL,
  subject TEXT NOT NULL, repeats TEXT, window INTEGER NOT NULL REFERENCES windows (id),
  body TEXT NOT NULL
) STRICT;
CREATE TABLE deliveries (
  alert TEXT NOT NULL REFERENCES alerts (id), sink TEXT NOT NULL, state TEXT NOT NULL,
  attempts INTEGER NOT NULL, changed TEXT NOT NULL, error TEXT NOT NULL, PRIMARY KEY (alert, sink)
) STRICT;
CREATE TABLE files (path TEXT NOT NULL, version TEXT NOT NULL, said TEXT NOT NULL,
  PRIMARY KEY (path, version)
) STRICT;
"""

Outcome = Literal["quiet", "alert"]
DeliveryState = Literal["pending", "held", "repeat", "sent", "given up"]


@dataclass(frozen=True)
class WindowRecord:
    """One judged window."""

    sha256: str
    created: str
    """UTC, ISO 8601: when it was judged."""
    num_rows: int
    outcome: Outcome
    labelled: bool = False
    model_version: str | None = None
    paths: list[str] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)
    """Numbers by key, such as `drift/<column>/<measure>`; `monitoring.measures` makes them."""
    details: dict[str, Any] = field(default_factory=dict)
    """The whole judgement, for pages."""
    id: int | None = None
    """Its place in the order of judging, from 1; given by the history."""


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
        self._database = Database(Path(path), _TABLES, SCHEMA_VERSION)

    def __enter__(self) -> Self:
        self._database.open()
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()

    # -- windows ---------------------------------------------------------------------------------

    def add_window(
        self,
        record: WindowRecord,
        detectors: Mapping[str, Mapping[str, Any]] | None = None,
        alerts: Sequence[Alert] = (),
        deliveries: Sequence[Delivery] = (),
    ) -> int:
        """Record a window with all that follows from it, in one transaction; its id.

        Raises:
            HistoryError: nothing of it was recorded; a window of this content is there already.
        """
        body = dataclasses.asdict(record)
        with self._database.transaction() as connection:
            row = (record.sha256, record.labelled, record.created, record.outcome, _text(body))
            id = connection.execute(
                "INSERT INTO windows (sha256, labelled, created, outcome, body) "
                "VALUES (?, ?, ?, ?, ?)",
                row,
            ).lastrowid
            assert id is not None
            connection.executemany(
                "INSERT OR REPLACE INTO detectors VALUES (?, ?)",
                [(name, _text(state)) for name, state in (detectors or {}).items()],
            )
            connection.executemany(
                "INSERT INTO alerts (id, created, state, subject, repeats, window, body) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (a.id, a.created, a.state, a.subject, a.repeats, id, _text(a.to_json()))
                    for a in alerts
                ],
            )
            for delivery in deliveries:
                self._put(connection, delivery)
        return id

    def window(self, sha256: str, labelled: bool) -> WindowRecord | None:
        """The window of this content, if it was judged with (or without) labels."""
        found = self._database.read(
            "SELECT id, body FROM windows WHERE sha256 = ? AND labelled = ?", sha256, labelled
        )
        return _record(found[0]) if found else None

    def windows(self, limit: int | None = None) -> list[WindowRecord]:
        """The last `limit` windows in the order of judging, oldest first; all by default."""
        found = self._database.read(
            "SELECT id, body FROM windows ORDER BY id DESC LIMIT ?", limit or -1
        )
        return [_record(row) for row in reversed(found)]

    def detector_state(self, name: str) -> dict[str, Any] | None:
        """State of a sequential detector after the last window; None before the first."""
        found = self._database.read("SELECT state FROM detectors WHERE name = ?", name)
        return json.loads(found[0][0]) if found else None

    # -- alerts ----------------------------------------------------------------------------------

    def alerts(
        self,
        state: State | None = None,
        since: datetime | None = None,
        window: int | None = None,
        limit: int | None = None,
        with_repeats: bool = True,
    ) -> list[Alert]:
        """The last `limit` alerts, all by default, in the order they were raised.

        Args:
            state: only those in this state.
            since: only those raised at this time (UTC) or later.
            window: only those of this window id.
            limit: how many.
            with_repeats: also those that repeat an earlier one.
        """
        found = self._database.read(
            "SELECT body FROM alerts WHERE (?1 IS NULL OR state = ?1) "
            "AND (?2 IS NULL OR created >= ?2) AND (?3 IS NULL OR window = ?3) "
            "AND (?5 OR repeats IS NULL) ORDER BY number DESC LIMIT ?4",
            *(state, stamp(since) if since else None, window, limit or -1, with_repeats),
        )
        return [Alert.from_json(json.loads(body)) for (body,) in reversed(found)]

    def alert(self, id: str) -> Alert:
        """The alert whose id begins so.

        Raises:
            DataError: there is none, or more than one.
        """
        found = self._database.read(
            "SELECT body FROM alerts WHERE substr(id, 1, ?) = ?", len(id), id
        )
        if len(found) != 1 or not id:
            raise DataError(
                f"One alert was to have an id that begins with {id!r}, but {len(found)} do. "
                f"`masklock alerts RUN list` shows them."
            )
        return Alert.from_json(json.loads(found[0][0]))

    def alert_ids(self) -> list[str]:
        """Ids of all alerts, in the order they were raised."""
        return [id for (id,) in self._database.read("SELECT id FROM alerts ORDER BY number")]

    def raised(self, earliest: datetime, latest: datetime) -> dict[str, str]:
        """Ids by subject of the alerts raised between two times, those that repeat one left out."""
        found = self._database.read(
            "SELECT subject, id FROM alerts WHERE repeats IS NULL AND created BETWEEN ? AND ? "
            "ORDER BY number",
            *(stamp(earliest), stamp(latest)),
        )
        return dict(found)

    def num_repeats(self) -> dict[str, int]:
        """How many alerts repeat each of those that were repeated."""
        found = self._database.read(
            "SELECT repeats, COUNT(*) FROM alerts GROUP BY 1 HAVING repeats NOT NULL"
        )
        return dict(found)

    def open_windows(self) -> set[tuple[str, bool]]:
        """Content and labelledness of the windows of open alerts that repeat no other."""
        found = self._database.read(
            "SELECT DISTINCT sha256, labelled FROM windows w JOIN alerts a ON a.window = w.id "
            "WHERE state = 'open' AND repeats IS NULL"
        )
        return {(sha256, bool(labelled)) for sha256, labelled in found}

    def acknowledge(self, id: str, who: str, note: str, at: datetime) -> list[Alert]:
        """Mark an alert as seen, with those that repeat it; the first acknowledgement stands.

        Returns:
            The alert, and the others that were marked.

        Raises:
            DataError: there is no alert, or more than one, whose id begins so.
        """
        seen = {"by": who, "at": stamp(at), "note": note}
        with self._database.transaction() as connection:
            alert = self.alert(id)
            marked = [
                dataclasses.replace(one, state="acknowledged", acknowledged=seen)
                for one in (alert, *self._open_repeats(alert.id))
                if one.state == "open"
            ]
            connection.executemany(
                "UPDATE alerts SET state = ?, body = ? WHERE id = ?",
                [(one.state, _text(one.to_json()), one.id) for one in marked],
            )
        return marked if marked and marked[0].id == alert.id else [alert, *marked]

    def _open_repeats(self, id: str) -> list[Alert]:
        found = self._database.read(
            "SELECT body FROM alerts WHERE repeats = ? AND state = 'open'", id
        )
        return [Alert.from_json(json.loads(body)) for (body,) in found]

    def deliveries(self, state: DeliveryState | None = None) -> list[Delivery]:
        """Deliveries in the order of their alerts."""
        found = self._database.read(
            "SELECT alert, sink, d.state, attempts, changed, error FROM deliveries d "
            "JOIN alerts a ON a.id = alert WHERE ?1 IS NULL OR d.state = ?1 ORDER BY number, sink",
            state,
        )
        return [Delivery(*row) for row in found]

    def num_told(self, earliest: datetime, latest: datetime, records: Collection[str]) -> int:
        """How many alerts were sent, or are about to be, between two times.

        Args:
            earliest, latest: the times.
            records: sinks that do not count.
        """
        found = self._database.read(
            "SELECT DISTINCT alert, sink FROM deliveries WHERE changed BETWEEN ? AND ? "
            "AND state IN ('pending', 'sent', 'given up')",
            *(stamp(earliest), stamp(latest)),
        )
        return len({alert for alert, sink in found if sink not in records})

    def save_delivery(self, delivery: Delivery) -> None:
        """Record how far a delivery has come."""
        with self._database.transaction() as connection:
            self._put(connection, delivery)

    # -- files of a watched folder ---------------------------------------------------------------

    def has_seen(self, path: str, version: str) -> bool:
        """Whether a file in this version (size and time) was judged, or refused."""
        return bool(
            self._database.read("SELECT 1 FROM files WHERE path = ? AND version = ?", path, version)
        )

    def saw(self, path: str, version: str, said: str) -> None:
        """Remember a file, and what was said of it."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (path, version, said)
            )

    def _put(self, connection: sqlite3.Connection, delivery: Delivery) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO deliveries VALUES (?, ?, ?, ?, ?, ?)",
            dataclasses.astuple(delivery),
        )


def _text(value: Mapping[str, Any]) -> str:
    """JSON; numbers that are not finite become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, ensure_ascii=False)


def _record(row: tuple[int, str]) -> WindowRecord:
    return WindowRecord(**{**json.loads(row[1]), "id": row[0]})
