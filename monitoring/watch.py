"""Watches a folder: every file that arrives is one window, judged once.

What was judged stands in the history, so a watch that was killed goes on where it was. A lock lets
one watch at a time look after a run. Waiting goes by a clock that nobody sets back.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from monitoring.history import History
from monitoring.scored_files import FORMATS
from pipeline.errors import DataError, InputError, MasklockError
from pipeline.locking import file_lock
from pipeline.records import RunFolder

SETTLE_SECONDS = 2.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Watch:
    """What to do with the files of a folder, and how often to look."""

    run: RunFolder
    folder: Path
    every_seconds: float
    judge: Callable[[Path], str]
    """Judges a file as a window; returns what to say of it."""
    retry: Callable[[], None]
    """Sends what could not be sent before."""
    say: Say
    settle_seconds: float = SETTLE_SECONDS
    """A file that does not change for so long is whole."""

    def until(self, stop: Event) -> None:
        """Look, judge and wait, until told to stop; the window at hand is finished first.

        Raises:
            BusyError: another watch looks after this run.
            InputError: the folder is missing, or the run cannot judge any window.
        """
        if not self.folder.is_dir():
            raise InputError(
                f"There is no folder {self.folder} to watch. Make it, or name another."
            )
        with file_lock(self.run.monitoring / "watch.lock", 0, f"this: a watch of {self.run.path}"):
            while not stop.is_set():
                started = time.monotonic()
                self._look(stop)
                stop.wait(max(0.0, self.every_seconds - (time.monotonic() - started)))

    def _look(self, stop: Event) -> None:
        """One round: judge the new files, oldest first, and send what is due."""
        try:
            for path, version in self._arrived(stop):
                self.say(f"{path.name}: {(said := self._said_of(path))}")
                with self._history() as history:
                    history.saw(str(path.resolve()), version, said)
                if stop.is_set():
                    return
            self.retry()
        except InputError:
            raise
        except (MasklockError, OSError) as error:  # a full disk, a lock: it may pass
            self.say(f"not yet: {error}")

    def _said_of(self, path: Path) -> str:
        try:
            return self.judge(path)
        except DataError as error:
            return f"refused: {error}"

    def _arrived(self, stop: Event) -> Iterator[tuple[Path, str]]:
        """New files that have not changed for a while."""
        new = self._new_files()
        if not new or stop.wait(self.settle_seconds):
            return
        for path, version in new.items():
            if _version(path) == version:
                yield path, version

    def _new_files(self) -> dict[Path, str]:
        """Files not seen in this version, by the time they were changed."""
        paths = [
            path
            for path in self.folder.iterdir()
            if path.suffix.lower() in FORMATS and not path.name.startswith(".")
        ]
        versions = {path: version for path in paths if (version := _version(path)) is not None}
        with self._history() as history:
            return {
                path: versions[path]
                for path in sorted(versions, key=lambda path: (_age(versions[path]), path.name))
                if not history.has_seen(str(path.resolve()), versions[path])
            }

    def _history(self) -> History:
        return History(self.run.monitoring / "history.sqlite")


def _version(path: Path) -> str | None:
    """Time of the last change and size; None for what is no file, or gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return f"{found.st_mtime_ns} {found.st_size}" if path.is_file() else None


def _age(version: str) -> int:
    return int(version.split()[0])
