"""Locks on files: held by a process and those it started, released when all of them are dead."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import BusyError

_POLL_SECONDS = 0.05


@contextlib.contextmanager
def file_lock(path: Path, patience_seconds: float, what: str) -> Iterator[int]:
    """Hold the lock of a file; yields its descriptor, which a child must inherit to hold it too.

    Raises:
        BusyError: another process held it all the time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait(descriptor, patience_seconds, what)
        yield descriptor
    finally:
        os.close(descriptor)


def _wait(descriptor: int, patience_seconds: float, what: str) -> None:
    give_up = time.monotonic() + patience_seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up:
                raise BusyError(f"Another process is working on {what}. Try again later.") from None
            time.sleep(_POLL_SECONDS)
