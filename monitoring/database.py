"""A file of SQLite that no crash leaves half-written, and errors that say what to do."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import HistoryError

BUSY_SECONDS = 30.0
CHECKED_BYTES = 64 * 2**20
"""Files up to this size are read whole for damage when opened; in others SQLite finds it."""


class Database:
    """Tables of a version in a file, opened and, if need be, made.

    Every method raises HistoryError where the file is damaged, of another version, locked for
    long, or the disk is full.
    """

    def __init__(self, path: Path, tables: str, version: int) -> None:
        self.path, self._tables, self._version = path, tables, version

    def open(self) -> None:
        """Open it in WAL mode; commits survive a power cut."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close it; what was not committed is undone."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
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

    def read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self._explained(), closing(self._connection.execute(query, values)) as cursor:
            return cursor.fetchall()

    def _prepare(self) -> None:
        for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._connection.execute(f"PRAGMA {setting}")
        with self.transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in filter(str.strip, self._tables.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {self._version}")
            elif version != self._version:
                raise HistoryError(
                    f"{self.path} is a history of version {version}, this Masklock reads version "
                    f"{self._version}. Use the Masklock that wrote it, or move the file aside."
                )
        if self.path.stat().st_size <= CHECKED_BYTES:
            faults = self.read("PRAGMA quick_check")
            if faults != [("ok",)]:
                raise sqlite3.DatabaseError(str(faults[0][0]))

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
