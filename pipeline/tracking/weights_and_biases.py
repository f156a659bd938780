"""Weights & Biases, kept at arm's length: it can fail in any way without changing a training.

Calls go through a bounded queue to a worker thread, and from there to a process of its own
(`wandb_process.py`): whatever hangs, crashes or takes memory can be killed. After the first failure
the tracker is dropped with one warning line, and the rest of the run is in JSON lines only.
"""

import contextlib
import json
import logging
import queue
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol, cast

from pipeline.config.schema import WandbConfig
from pipeline.records import RunFolder, write_text
from pipeline.tracking.redaction import without_secrets
from pipeline.tracking.wandb_file import num_history_rows

logger = logging.getLogger(__name__)

_PROCESS_SCRIPT = Path(__file__).with_name("wandb_process.py")


class Client(Protocol):
    """Answers requests, in the worker thread. `kill` may come from another thread at any time."""

    def request(self, message: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """The reply, or any exception."""

    def kill(self) -> None:
        """Free whatever a request that hangs is holding."""


class WandbClient:
    """The process that holds the real run, started by the first request."""

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path
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
            raise RuntimeError(reply["error"])
        return reply

    def kill(self) -> None:
        """End the process; the service that wandb starts ends with it."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):  # requests that nobody reads any more
                self._process.__exit__(None, None, None)  # closes the pipes and waits

    def _start(self) -> subprocess.Popen[str]:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log_path, "ab") as log:
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
            )


class WandbTracker:
    """One run of Weights & Biases, under the same id after a resume of the training.

    Args:
        config: the `wandb` section.
        folder: the run folder; the id is kept in its `wandb/`.
        mode: `offline`, `online`, or another mode that wandb knows.
        client: what answers the requests; by default a process of its own.
        queue_size: requests that may wait; one more means that nobody takes them.
        call_seconds: time for one request.
        finish_seconds: how long `finish` waits for the next request to be answered.
    """

    def __init__(
        self,
        config: WandbConfig,
        folder: RunFolder,
        mode: str | None = None,
        client: Client | None = None,
        queue_size: int = 10_000,
        call_seconds: float = 60.0,
        finish_seconds: float = 10.0,
    ) -> None:
        self._config = config
        self._folder = folder
        self._mode = mode or config.mode
        self._client = client or WandbClient(folder.wandb / "masklock.log")
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(queue_size)
        self._call_seconds = call_seconds
        self._finish_seconds = finish_seconds
        self._last_step = 0
        self._num_rows = 0
        self._num_rows_taken = 0
        self._started = False
        self._last_answer = time.monotonic()
        self._busy_since: float | None = None
        self._opened: dict[str, Any] = {}
        self._failure: str | None = None
        self._failure_lock = threading.Lock()
        self._ended = threading.Event()

    def start(self, config: Mapping[str, Any], run_name: str) -> None:
        """Open the run in the background."""
        self._started = True
        try:
            self._put({"do": "start", **self._run_arguments(config, run_name)})
            threading.Thread(target=self._work, name="wandb", daemon=True).start()
        except Exception as error:
            self._drop(f"{type(error).__name__}: {error}")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one row of history at this `train/global_step`."""
        self._last_step = step
        self._num_rows += 1
        self._put({"do": "log", "metrics": dict(metrics), "step": step})

    def rewind(self, step: int) -> None:
        """Rows that are gone cannot be called back; they are logged again at their steps."""

    def figure(self, name: str, png: Path) -> None:
        """Add a picture at the last step."""
        self._put({"do": "figure", "name": name, "png": str(png), "step": self._last_step})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final numbers."""
        self._put({"do": "summary", "values": dict(values)})

    def finish(self) -> str:
        """Wait while requests are answered, then say how many rows arrived."""
        if not self._started:
            return ""
        self._put({"do": "finish"})
        asked = time.monotonic()
        while not self._ended.wait(0.02):
            if time.monotonic() - max(asked, self._last_answer) > self._finish_seconds:
                self._drop(f"no answer within {self._finish_seconds:g} s at the end")
        return self._sentence()

    def _run_arguments(self, config: Mapping[str, Any], run_name: str) -> dict[str, Any]:
        """Arguments of `wandb.init`."""
        return {
            "project": self._config.project,
            "entity": self._config.entity,
            "tags": list(self._config.tags),
            "name": run_name,
            "id": self._run_id(),
            "dir": str(self._folder.path),
            "mode": self._mode,
            "config": without_secrets(config),
            "resume": "allow" if self._mode == "online" else None,
        }

    def _run_id(self) -> str:
        """The id of the first start, so that a resumed training goes on in the same run."""
        path = self._folder.wandb / "masklock-run-id"
        if not path.exists() or not path.read_text().strip():
            write_text(path, secrets.token_hex(4) + "\n")
        return path.read_text().strip()

    def _put(self, message: dict[str, Any]) -> None:
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._call_seconds:
            self._drop(f"no answer within {self._call_seconds:g} s")
        if self._failure is not None:
            return
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._drop(f"{self._queue.maxsize} requests are waiting")

    def _work(self) -> None:
        """The worker thread: hands over one request after the other until the end or a failure."""
        try:
            while not self._ended.is_set():
                message = self._queue.get()
                self._busy_since = time.monotonic()
                self._handle(message)
                self._last_answer, self._busy_since = time.monotonic(), None
        except BaseException as error:
            self._drop(str(error) or type(error).__name__)

    def _handle(self, message: dict[str, Any]) -> None:
        reply = self._client.request(message, self._call_seconds)
        if message["do"] == "start":
            self._opened = reply
        elif message["do"] == "log":
            self._num_rows_taken += 1
        elif message["do"] == "finish":
            self._client.kill()
            self._ended.set()

    def _drop(self, reason: str) -> None:
        """Give up for the rest of the run, with one warning line."""
        with self._failure_lock:
            if self._failure is not None or self._ended.is_set():
                return
            self._failure = " ".join(reason.split()).rstrip(".")
        logger.warning(
            "Weights & Biases (%s) is dropped: %s. The training goes on; its numbers are in %s.",
            self._mode,
            self._failure,
            self._folder.metrics,
        )
        self._ended.set()
        threading.Thread(target=self._client.kill, daemon=True).start()

    def _sentence(self) -> str:
        """How many of how many rows arrived, or how many did until it was dropped."""
        where = self._opened.get("url") or self._opened.get("folder", "")
        name = f"Weights & Biases ({self._mode})"
        rows = f"{self._num_rows_arrived()} of {self._num_rows} rows arrived"
        if self._failure is not None:
            return f"{name}: {rows}{f' in {where}' if where else ''}; dropped: {self._failure}."
        if self._mode == "offline":
            return f"{name}: {rows}; send them with `wandb sync {where}`."
        return f"{name}: {rows}{f' at {where}' if where else ''}."

    def _num_rows_arrived(self) -> int:
        """Rows in the file of an offline run; else rows that wandb took."""
        if self._mode != "offline" or "folder" not in self._opened:
            return self._num_rows_taken
        try:
            (path,) = Path(self._opened["folder"]).glob("*.wandb")
            return min(num_history_rows(path), self._num_rows)
        except (ValueError, OSError, IndexError):  # another format than the one we know
            return self._num_rows_taken


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as numbers, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
