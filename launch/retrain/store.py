"""The state of a line of models in SQLite: retrainings, every change of theirs, and who is at work.

Each change is one transaction, and only the present holder of the lease can make one.
"""

import json
import os
import socket
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import BusyError, InputError

State = Literal[
    "triggered",
    "data checked",
    "training",
    "evaluating",
    "gated",
    "promoted",
    "rejected",
    "rolled back",
    "failed",
]
OPEN: tuple[State, ...] = ("triggered", "data checked", "training", "evaluating", "gated")
Clock = Callable[[], datetime]
Reach = Callable[[str], None]
_VERSION = 1
_TABLES = (
    "CREATE TABLE retrainings (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, "
    "state TEXT NOT NULL, body TEXT NOT NULL) STRICT",
    "CREATE TABLE changes (number INTEGER PRIMARY KEY, retraining INTEGER NOT NULL, "
    "at TEXT NOT NULL, state TEXT NOT NULL, said TEXT NOT NULL) STRICT",
    "CREATE TABLE holder (one INTEGER PRIMARY KEY CHECK (one = 1), token TEXT NOT NULL, "
    "host TEXT NOT NULL, pid INTEGER NOT NULL, seen TEXT NOT NULL) STRICT",
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
)


@dataclass(frozen=True)
class Retraining:
    """One retraining, from its trigger to its end."""

    key: str
    """Hash of what decides it; a key is retrained once."""
    trigger: str
    evidence: dict[str, Any]
    """What each trigger saw."""
    champion: str
    """The version that it was started against."""
    started: str
    seen: dict[str, Any] = field(default_factory=dict)
    """What later triggers must not count again: `window`, `rows` by file."""
    state: State = "triggered"
    changed: str = ""
    reason: str = ""
    failures: int = 0
    not_before: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What its stages found: rows, challenger, verdict, watch."""
    number: int = 0

    @property
    def is_open(self) -> bool:
        """Whether there is still something to do."""
        return self.state in OPEN

    def knows(self, **facts: Any) -> "Retraining":
        """The same, with more facts."""
        return replace(self, facts=self.facts | facts)


class Store:
    """Opens, and if need be makes, the state at a path; close it after use."""

    def __init__(self, path: Path, now: Clock, reach: Reach = lambda point: None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._now, self._reach = path, now, reach
        self._token = ""
        self._connection = _open(path)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # -- retrainings -----------------------------------------------------------------------------

    def retrainings(self) -> list[Retraining]:
        """All of them, oldest first."""
        rows = self._connection.execute("SELECT number, body FROM retrainings ORDER BY number")
        return [Retraining(**{**json.loads(body), "number": number}) for number, body in rows]

    def open_one(self) -> Retraining | None:
        """The retraining that has not ended; there is never more than one."""
        return next((one for one in self.retrainings() if one.is_open), None)

    def has(self, key: str) -> bool:
        """Whether there was a retraining of this key."""
        found = self._connection.execute("SELECT 1 FROM retrainings WHERE key = ?", (key,))
        return found.fetchone() is not None

    def begin(self, retraining: Retraining) -> Retraining:
        """Add a retraining."""
        retraining = replace(retraining, changed=self._stamp())
        with self._holding() as connection:
            number = connection.execute(
                "INSERT INTO retrainings (key, state, body) VALUES (?, ?, ?)",
                (retraining.key, retraining.state, _text(asdict(retraining))),
            ).lastrowid
            assert number is not None
            self._log(connection, number, retraining.state, retraining.trigger)
        self._reach("begun")
        return replace(retraining, number=number)

    def move(self, retraining: Retraining, state: State, said: str = "") -> Retraining:
        """Bring a retraining into a state; `said` is why."""
        after = replace(retraining, state=state, changed=self._stamp(), reason=said)
        with self._holding() as connection:
            connection.execute(
                "UPDATE retrainings SET state = ?, body = ? WHERE number = ?",
                (state, _text(asdict(after)), after.number),
            )
            self._log(connection, after.number, state, said)
        self._reach(state)
        return after

    def changes(self, number: int | None = None) -> list[dict[str, Any]]:
        """Every change of state, oldest first."""
        rows = self._connection.execute(
            "SELECT retraining, at, state, said FROM changes "
            "WHERE ?1 IS NULL OR retraining = ?1 ORDER BY number",
            (number,),
        )
        return [dict(zip(("retraining", "at", "state", "said"), row, strict=True)) for row in rows]

    # -- settings --------------------------------------------------------------------------------

    def setting(self, name: str) -> str | None:
        """A value kept by name."""
        row = self._connection.execute("SELECT value FROM settings WHERE name = ?", (name,))
        found = row.fetchone()
        return None if found is None else str(found[0])

    def set(self, name: str, value: str | None) -> None:
        """Keep a value, or forget it. Needs no lease: it is how people interfere."""
        with _transaction(self._connection) as connection:
            connection.execute("DELETE FROM settings WHERE name = ?", (name,))
            if value is not None:
                connection.execute("INSERT INTO settings VALUES (?, ?)", (name, value))

    # -- the lease -------------------------------------------------------------------------------

    def take(self, lease_seconds: float) -> str | None:
        """Become the holder. Returns whom the lease was taken over from, if it was not given back.

        The caller has the lock of this machine, so a holder on this machine is dead.

        Raises:
            BusyError: a holder on another machine was heard of within `lease_seconds`.
        """
        token, host = uuid.uuid4().hex, socket.gethostname()
        with _transaction(self._connection) as connection:
            row = connection.execute("SELECT host, pid, seen FROM holder").fetchone()
            if row is not None and row[0] != host:
                silent = self._now() - datetime.fromisoformat(row[2])
                if silent < timedelta(seconds=lease_seconds):
                    raise BusyError(
                        f"Process {row[1]} on {row[0]} works on this (last heard of {row[2]}). "
                        "Try again later."
                    )
            connection.execute("DELETE FROM holder")
            holder = (token, host, os.getpid(), self._stamp())
            connection.execute("INSERT INTO holder VALUES (1, ?, ?, ?, ?)", holder)
        self._token = token
        return None if row is None else f"process {row[1]} on {row[0]}"

    def give_back(self) -> None:
        """End being the holder; without effect for one that is not any more."""
        with _transaction(self._connection) as connection:
            connection.execute("DELETE FROM holder WHERE token = ?", (self._token,))

    @property
    def token(self) -> str:
        """What the present holder is known by."""
        return self._token

    def beat(self, token: str) -> bool:
        """Say that the holder lives; False when it is the holder no more."""
        with _transaction(self._connection) as connection:
            found = connection.execute(
                "UPDATE holder SET seen = ? WHERE token = ?", (self._stamp(), token)
            )
        return found.rowcount == 1

    @contextmanager
    def _holding(self) -> Iterator[sqlite3.Connection]:
        """A transaction of the holder: one that was taken over from changes nothing any more."""
        with _transaction(self._connection) as connection:
            held = connection.execute("SELECT 1 FROM holder WHERE token = ?", (self._token,))
            if held.fetchone() is None:
                raise BusyError(
                    "The lease was lost: this process was not heard of for too long, and another "
                    "one has taken over. Nothing was changed."
                )
            yield connection

    def _log(self, connection: sqlite3.Connection, number: int, state: str, said: str) -> None:
        connection.execute(
            "INSERT INTO changes (retraining, at, state, said) VALUES (?, ?, ?, ?)",
            (number, self._stamp(), state, said),
        )

    def _stamp(self) -> str:
        return self._now().isoformat(timespec="seconds")


def _open(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        # No write-ahead log: it needs memory that is shared, and machines share only the file.
        for setting in ("journal_mode = DELETE", "synchronous = FULL"):
            connection.execute(f"PRAGMA {setting}")
        with _transaction(connection):
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _TABLES:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"{path} was to hold the state of retraining, but cannot be used: {error}. If it is "
            "damaged, move it aside: retraining then begins anew; the registry is not touched."
        ) from error
    if version not in (0, _VERSION):
        connection.close()
        raise InputError(
            f"{path} is of version {version}, this Masklock reads version {_VERSION}. Use the "
            "Masklock that wrote it, or move the file aside."
        )
    return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise BusyError(
            f"The state of retraining could not be written: {error}. Nothing was changed; try "
            "again once the disk has room and no other process holds the file."
        ) from error
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
