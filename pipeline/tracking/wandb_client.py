"""The two ends of the pipe to the process that holds a W&B run: who asks, and who is asked."""

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, Protocol, cast

_PROCESS_SCRIPT = Path(__file__).with_name("wandb_process.py")


class RefusedError(Exception):
    """The process answered that a request failed: it can still be asked to close its files."""


class Client(Protocol):
    """Answers requests, in the worker thread. `kill` may come from another thread at any time."""

    def request(self, message: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """The reply, or any exception."""

    def kill(self) -> None:
        """Free whatever a request that hangs is holding."""


class WandbClient:
    """The process that holds the real run, started by the first request.

    Args:
        folder: the run's `wandb/`, for the process's log and what W&B copies of artifacts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def request(self, message: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """Send one line, wait for one line."""
        process = self._process = self._process or self._start()
        requests, replies = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
        requests.write(json.dumps(message, default=_plain) + "\n")
        requests.flush()
        if not select.select([replies], [], [], timeout_seconds)[0]:
            raise TimeoutError(f"no answer within {timeout_seconds:g} s")
        if not (line := replies.readline()):
            raise ConnectionError("its process died")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RefusedError(reply["error"])
        return reply

    def kill(self) -> None:
        """End the process; the service that wandb starts ends with it."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):  # requests that nobody reads any more
                self._process.__exit__(None, None, None)  # closes the pipes and waits

    def _start(self) -> subprocess.Popen[str]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / "masklock.log", "ab") as log:
            # -P: the folder of the script must not shadow what wandb imports.
            # An own session: Ctrl-C in the terminal is for the trainer alone.
            return subprocess.Popen(
                [sys.executable, "-P", str(_PROCESS_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                start_new_session=True,
                # Copies of artifacts wait in the run folder, for `wandb sync`, not in the home.
                env={"WANDB_DATA_DIR": str(self._folder), **os.environ},
            )


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as numbers, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
