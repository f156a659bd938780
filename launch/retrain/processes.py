"""Stages as processes: `python -m pipeline ...`, their output in a log file."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMED_OUT = 124
STOPPED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
logger = logging.getLogger(__name__)
Run = Callable[[Sequence[str], Path], int]
"""Words of a command and a log file -> exit code; 75: stopped, run again to go on."""


class Processes:
    """Runs stages, one at a time, and passes on the signals that ask to stop.

    Args:
        lock: descriptor of the lock that a stage holds as long as it lives.
        limit: a stage that takes longer is asked to stop.
        grace: ... and killed after this.
    """

    def __init__(
        self, lock: int, limit: timedelta, grace: timedelta = timedelta(minutes=2)
    ) -> None:
        self._lock, self._limit, self._grace = lock, limit, grace

    def __call__(self, words: Sequence[str], log: Path) -> int:
        """Run to its end; returns the exit code, 124 when it took too long."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            output.write(f"$ masklock {' '.join(words)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes by us alone: a second signal would not save
                pass_fds=(self._lock,),
                cwd=os.getcwd(),
            )
            with _passing_on(process):
                return self._wait(process)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(self._limit.total_seconds())
        except subprocess.TimeoutExpired:
            logger.warning("The stage took longer than %s: asked to stop.", self._limit)
        process.terminate()
        try:
            process.wait(self._grace.total_seconds())
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return TIMED_OUT


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A signal to us asks the stage to save and stop; only the main thread of a program may."""

    def pass_on(number: int, frame: Any) -> None:
        process.send_signal(signal.SIGTERM)

    try:
        before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_lines(log: Path, number: int = 12) -> str:
    """The end of a log, for a message."""
    if not log.is_file():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-number:])
