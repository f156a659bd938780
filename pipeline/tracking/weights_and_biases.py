"""Weights & Biases, kept at arm's length: it can fail in any way without changing a training.

Calls go through a bounded queue to a worker thread, and from there to a process of its own
(`wandb_process.py`): whatever hangs, crashes or takes memory can be killed. After the first failure
the tracker is dropped with one warning line, and the rest of the run is in JSON lines only.
"""

import contextlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import WandbConfig
from pipeline.exhibits import Curve, Exhibit, Notice, Picture
from pipeline.metric_names import NAMESPACES, STEP, WINDOW
from pipeline.records import RunFolder, write_text
from pipeline.tracking.redaction import without_secrets
from pipeline.tracking.wandb_client import Client, RefusedError, WandbClient
from pipeline.tracking.wandb_file import num_confirmed_lines, num_history_records, num_history_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Which run of W&B: the training's, which the evaluation goes on with, or the monitoring's."""

    job_type: str
    axis: str
    id_suffix: str = ""


TRAINING = Part("train", STEP)
# A run of its own, so that its x axis is the window and no window reopens a finished training.
MONITORING = Part("monitor", WINDOW, "-monitor")


class WandbTracker:
    """One run of Weights & Biases, under the same id after a resume of the training.

    Args:
        config: the `wandb` section.
        folder: the run folder; the id is kept in its `wandb/`.
        mode: `offline`, `online`, or another mode that wandb knows.
        part: which of the two W&B runs of this run folder.
        client: what answers the requests; by default a process of its own.
        queue_size: requests that may wait; one more means that nobody takes them.
        timeout_seconds: time for one request, and how long `finish` and `alert` wait for the next
            answer; by default the configuration's.
    """

    def __init__(
        self,
        config: WandbConfig,
        folder: RunFolder,
        mode: str | None = None,
        part: Part = TRAINING,
        client: Client | None = None,
        queue_size: int = 10_000,
        timeout_seconds: float | None = None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._mode = mode or config.mode
        self._part = part
        self._client = client or WandbClient(folder.wandb)
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(queue_size)
        self._timeout = timeout_seconds or config.timeout_seconds
        # wandb itself stops sending in time; then it closes its files.
        self._finish_timeout = self._timeout + min(self._timeout, 5.0)
        self._run_name = ""
        self._last_step = 0
        self._num_asked = 0
        self._num_answered = 0
        self._history: list[bool] = []  # what was asked to be in the history: is it a row?
        self._num_history_taken = 0
        self._last_answer = time.monotonic()
        self._busy_since: float | None = None
        self._opened: dict[str, Any] = {}
        self._failure: str | None = None
        self._closing_seconds = 0.0
        self._failure_lock = threading.Lock()
        self._ended = threading.Event()
        self._killed = threading.Event()

    def start(self, config: Mapping[str, Any], run_name: str) -> None:
        """Open the run in the background."""
        self._run_name = run_name
        try:
            self._put({"do": "start", **self._run_arguments(config)})
            threading.Thread(target=self._work, name="wandb", daemon=True).start()
        except Exception as error:
            self._drop(f"{type(error).__name__}: {error}")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one row of history at this step of the x axis."""
        self._last_step = step
        self._history.append(True)
        self._put({"do": "log", "row": {**self._axis(), **metrics}})

    def rewind(self, step: int) -> None:
        """Rows that are gone cannot be called back; they are logged again at their steps."""

    def show(self, name: str, exhibit: Exhibit) -> None:
        """Add a picture, a curve or a table at the last step."""
        self._history.append(False)
        self._put({"name": name, "row": self._axis(), **_as_request(exhibit)})

    def artifact(self, kind: str, path: Path) -> None:
        """Log a version of `<run>-<kind>`."""
        name = f"{self._run_name}-{kind}"
        self._put({"do": "artifact", "name": name, "kind": kind, "path": str(path)})

    def alert(self, notice: Notice) -> None:
        """Send one alert and wait until wandb has taken it; ConnectionError where it has not."""
        fields = {"title": notice.title, "text": notice.text, "severity": notice.severity}
        number = self._put({"do": "alert", **fields})
        self._wait(lambda: self._num_answered >= number, self._timeout, "to the alert")
        if self._failure is not None and self._num_answered < number:
            raise ConnectionError(f"Weights & Biases ({self._mode}) is dropped: {self._failure}")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final numbers."""
        self._put({"do": "summary", "values": dict(values)})

    def finish(self) -> str:
        """Wait while requests are answered, then say how many rows arrived."""
        if not self._run_name:
            return ""
        self._put({"do": "finish"})
        self._wait(self._ended.is_set, self._finish_timeout, "at the end")
        if self._failure is not None:  # a program that ends at once would leave a process behind
            self._killed.wait(self._closing_seconds + 1.0)
        return self._sentence()

    def _run_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `Session.start`: the x axis, and those of `wandb.init`."""
        return {
            "axis": self._part.axis,
            "namespaces": list(NAMESPACES),
            "project": self._config.project,
            "entity": self._config.entity,
            "tags": list(self._config.tags),
            "group": self._run_name,
            "job_type": self._part.job_type,
            "name": self._run_name + self._part.id_suffix,
            "id": self._run_id() + self._part.id_suffix,
            "dir": str(self._folder.path),
            "mode": self._mode,
            "config": without_secrets(config),
            "resume": "allow" if self._mode == "online" else None,
            "finish_seconds": self._timeout,
            "first_step": None if self._mode == "online" else self._num_earlier_steps(),
        }

    def _run_id(self) -> str:
        """The id of the first start, so that a resumed training goes on in the same run."""
        path = self._folder.wandb / "masklock-run-id"
        if not path.exists() or not path.read_text().strip():
            write_text(path, secrets.token_hex(4) + "\n")
        return path.read_text().strip()

    def _num_earlier_steps(self) -> int:
        """Where W&B's own count of rows goes on: offline nobody else knows what came before."""
        files = self._folder.wandb.glob(f"*run-*/run-{self._run_id()}{self._part.id_suffix}.wandb")
        try:
            return sum(num_history_records(path) for path in files)
        except (ValueError, OSError, IndexError):  # another format than the one we know
            return 0

    def _axis(self) -> dict[str, float]:
        return {self._part.axis: self._last_step}

    def _put(self, message: dict[str, Any]) -> int:
        """Hand over a request; its number. What comes after a failure is passed over."""
        self._num_asked += 1
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._timeout:
            self._drop(f"no answer within {self._timeout:g} s")
        if self._failure is None:
            try:
                self._queue.put_nowait(message)
            except queue.Full:
                self._drop(f"{self._queue.maxsize} requests are waiting")
        return self._num_asked

    def _wait(self, is_done: Callable[[], bool], seconds: float, where: str) -> None:
        """Until it is done or has failed, as long as requests are being answered."""
        asked = time.monotonic()
        while not (is_done() or self._ended.wait(0.02)):
            if time.monotonic() - max(asked, self._last_answer) > seconds:
                self._drop(f"no answer within {seconds:g} s {where}")

    def _work(self) -> None:
        """The worker thread: hands over one request after the other until the end or a failure."""
        try:
            while not self._ended.is_set():
                message = self._queue.get()
                self._busy_since = time.monotonic()
                self._handle(message)
                self._last_answer, self._busy_since = time.monotonic(), None
        except RefusedError as error:
            self._drop(str(error), closing_seconds=self._finish_timeout)
        except BaseException as error:
            self._drop(str(error) or type(error).__name__)

    def _handle(self, message: dict[str, Any]) -> None:
        seconds = self._finish_timeout if message["do"] == "finish" else self._timeout
        reply = self._client.request(message, seconds)
        self._num_answered += 1
        if message["do"] == "start":
            self._opened = reply
        elif "row" in message:
            self._num_history_taken += 1
        elif message["do"] == "finish":
            self._client.kill()
            self._ended.set()

    def _drop(self, reason: str, closing_seconds: float = 0.0) -> None:
        """Give up for the rest of the run, with one warning line.

        A process that still answers gets some seconds to close the file with the rows so far.
        """
        with self._failure_lock:
            if self._failure is not None or self._ended.is_set():
                return
            self._failure = " ".join(reason.split()).rstrip(".")
            self._closing_seconds = closing_seconds
        logger.warning(
            "Weights & Biases (%s) is dropped: %s. All goes on without it; the numbers are in %s.",
            self._mode,
            self._failure,
            self._folder.path,
        )
        self._ended.set()
        threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        if self._closing_seconds:
            with contextlib.suppress(Exception):
                self._client.request({"do": "finish"}, self._closing_seconds)
        self._client.kill()
        self._killed.set()

    def _sentence(self) -> str:
        """How many of how many rows arrived, and what to do about the rest."""
        num_rows, arrived = sum(self._history), self._num_rows_arrived()
        folder, url = self._opened.get("folder", ""), self._opened.get("url", "")
        sentence = f"Weights & Biases ({self._mode}): {arrived} of {num_rows} rows arrived"
        if url or (folder and self._failure):
            sentence += f" at {url}" if url else f" in {folder}"
        if self._failure is not None:
            sentence += f"; dropped: {self._failure}"
        if self._mode == "offline":
            if arrived < num_rows and self._failure is None:
                sentence += f"; the others are in {self._folder.path} alone (is the disk full?)"
            sentence += f"; send them with `wandb sync {folder}`" if folder else ""
        elif folder and arrived < num_rows:
            sentence += f"; send the others with `wandb sync --include-online {folder}`"
        return sentence + "."

    def _num_rows_arrived(self) -> int:
        """Rows in the file of an offline run, rows the server has confirmed; else rows taken."""
        taken = sum(self._history[: self._num_history_taken])
        if "folder" not in self._opened:
            return taken
        folder = Path(self._opened["folder"])
        try:
            if self._mode == "offline":
                (path,) = folder.glob("*.wandb")
                return min(num_history_rows(path), sum(self._history))
            return sum(self._history[: num_confirmed_lines(folder / "logs" / "debug-internal.log")])
        except (ValueError, KeyError, OSError, IndexError):  # another format than the one we know
            return taken


def _as_request(exhibit: Exhibit) -> dict[str, Any]:
    if isinstance(exhibit, Picture):
        return {"do": "show_picture", "png": str(exhibit.png)}
    if isinstance(exhibit, Curve):
        lines = {name: list(points) for name, points in exhibit.lines.items()}
        return {"do": "show_curve", "title": exhibit.title, "x": exhibit.x, "lines": lines}
    rows = [list(row) for row in exhibit.rows]
    return {"do": "show_table", "columns": list(exhibit.columns), "rows": rows}
