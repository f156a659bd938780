"""The history of a run's windows in SQLite: what was judged, what was found, who was told.

One transaction a window holds its measures, the state of the sequential detectors, its alerts and
their deliveries still to make (an outbox): a process that dies leaves all of it or nothing.
"""

import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from monitoring.alerts import Alert, State, stamp
from pipeline.errors import DataError, HistoryError

SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0
_TABLES = """
CREATE TABLE windows (
  id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, labelled INTEGER NOT NULL, created TEXT NOT NULL,
  outcome TEXT NOT NULL, body TEXT NOT NULL, UNIQUE (sha256, labelled)
) STRICT;
CREATE TABLE detectors (name TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT;
CREATE TABLE alerts (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created TEXT NOT NULL, state TEXT NOT NULL,
  window INTEGER NOT NULL REFERENCES windows (id), body TEXT NOT NULL
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
        self.path = Path(path)

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            try:
                self._connection = connection
                self._prepare()
            except BaseException:
                connection.close()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

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
        with self._transaction() as connection:
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
                "INSERT INTO alerts (id, created, state, window, body) VALUES (?, ?, ?, ?, ?)",
                [(a.id, a.created, a.state, id, _text(a.to_json())) for a in alerts],
            )
            for delivery in deliveries:
                self._put(delivery)
        return id

    def window(self, sha256: str, labelled: bool) -> WindowRecord | None:
        """The window of this content, if it was judged with (or without) labels."""
        found = self._read(
            "SELECT id, body FROM windows WHERE sha256 = ? AND labelled = ?", sha256, labelled
        )
        return _record(found[0]) if found else None

    def windows(self, limit: int | None = None) -> list[WindowRecord]:
        """The last `limit` windows in the order of judging, oldest first; all by default."""
        found = self._read("SELECT id, body FROM windows ORDER BY id DESC LIMIT ?", limit or -1)
        return [_record(row) for row in reversed(found)]

    def detector_state(self, name: str) -> dict[str, Any] | None:
        """State of a sequential detector after the last window; None before the first."""
        found = self._read("SELECT state FROM detectors WHERE name = ?", name)
        return json.loads(found[0][0]) if found else None

    # -- alerts ----------------------------------------------------------------------------------

    def alerts(
        self, state: State | None = None, since: datetime | None = None, window: int | None = None
    ) -> list[Alert]:
        """Alerts in the order they were raised: of a state, since a time (UTC), of a window id."""
        found = self._read(
            "SELECT body FROM alerts WHERE (?1 IS NULL OR state = ?1) "
            "AND (?2 IS NULL OR created >= ?2) AND (?3 IS NULL OR window = ?3) ORDER BY number",
            state,
            stamp(since) if since else None,
            window,
        )
        return [Alert.from_json(json.loads(body)) for (body,) in found]

    def acknowledge(self, id: str, who: str, note: str, at: datetime) -> Alert:
        """Mark an alert as seen; the first acknowledgement stands.

        Raises:
            DataError: there is no alert, or more than one, whose id begins so.
        """
        with self._transaction() as connection:
            matching = [alert for alert in self.alerts() if alert.id.startswith(id)]
            if len(matching) != 1:
                raise DataError(
                    f"The alert {id!r} was to be acknowledged, but {len(matching)} alerts have an "
                    f"id that begins so. `masklock alerts RUN list` shows them."
                )
            alert = matching[0]
            if alert.state == "open":
                seen = {"by": who, "at": stamp(at), "note": note}
                alert = dataclasses.replace(alert, state="acknowledged", acknowledged=seen)
                connection.execute(
                    "UPDATE alerts SET state = ?, body = ? WHERE id = ?",
                    (alert.state, _text(alert.to_json()), alert.id),
                )
        return alert

    def deliveries(self, state: DeliveryState | None = None) -> list[Delivery]:
        """Deliveries in the order of their alerts."""
        found = self._read(
            "SELECT alert, sink, d.state, attempts, changed, error FROM deliveries d "
            "JOIN alerts a ON a.id = alert WHERE ?1 IS NULL OR d.state = ?1 ORDER BY number, sink",
            state,
        )
        return [Delivery(*row) for row in found]

    def save_delivery(self, delivery: Delivery) -> None:
        """Record how far a delivery has come."""
        with self._transaction():
            self._put(delivery)

    # -- files of a watched folder ---------------------------------------------------------------

    def has_seen(self, path: str, version: str) -> bool:
        """Whether a file in this version (size and time) was judged, or refused."""
        return bool(self._read("SELECT 1 FROM files WHERE path = ? AND version = ?", path, version))

    def saw(self, path: str, version: str, said: str) -> None:
        """Remember a file, and what was said of it."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (path, version, said)
            )

    # -- SQLite ----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Settings and, in a new file, tables; a later version and damage are refused."""
        for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._connection.execute(f"PRAGMA {setting}")
        with self._transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in filter(str.strip, _TABLES.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise HistoryError(
                    f"{self.path} is a history of version {version}, this Masklock reads version "
                    f"{SCHEMA_VERSION}. Use the Masklock that wrote it, or move the file aside."
                )
        faults = self._read("PRAGMA quick_check")
        if faults != [("ok",)]:
            raise sqlite3.DatabaseError(str(faults[0][0]))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is written inside, or nothing of it."""
        with self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._explained(), closing(self._connection.execute(query, values)) as cursor:
            return cursor.fetchall()

    def _put(self, delivery: Delivery) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO deliveries VALUES (?, ?, ?, ?, ?, ?)",
            dataclasses.astuple(delivery),
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise HistoryError(
                f"{self.path} could not be read or written: {error}. Nothing was changed; run "
                f"again once the disk has room and no other process holds the file."
            ) from None
        except sqlite3.DatabaseError as error:
            raise HistoryError(
                f"{self.path} is damaged, or holds this already: {error}. If it is damaged, move "
                f"it aside with its -wal and -shm files: the next window starts a new history."
            ) from None


def _text(value: Mapping[str, Any]) -> str:
    """JSON; numbers that are not finite become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, ensure_ascii=False)


def _record(row: tuple[int, str]) -> WindowRecord:
    return WindowRecord(**{**json.loads(row[1]), "id": row[0]})
