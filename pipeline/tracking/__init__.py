"""Where the numbers of a run go: JSON lines (the truth), Weights & Biases, or nowhere.

The only place that reads the environment for Weights & Biases. A tracker other than JSON lines can
fail in any way without changing a training.
"""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.schema import RunConfig
from pipeline.records import RunFolder, append_jsonl, read_jsonl, write_jsonl
from pipeline.tracking.weights_and_biases import WandbTracker

__all__ = [
    "JsonLinesTracker",
    "NullTracker",
    "Tracker",
    "TrackerGroup",
    "WandbTracker",
    "open_tracker",
]

# Older names that Weights & Biases still documents.
_WANDB_MODES = {"dryrun": "offline", "run": "online"}


class Tracker(Protocol):
    """What a training tells about itself. Metric names are `namespace/metric`."""

    def start(self, config: Mapping[str, Any], run_name: str) -> None:
        """Begin, or go on with a run that was interrupted."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers that belong to this optimizer step."""

    def rewind(self, step: int) -> None:
        """Forget rows later than this step: the training resumes from there."""

    def figure(self, name: str, png: Path) -> None:
        """Show a picture."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record final numbers of the whole run."""

    def finish(self) -> str:
        """End, and say in one sentence how many rows arrived, or why not."""


class NullTracker:
    """Records nothing: processes other than the main one."""

    def start(self, config: Mapping[str, Any], run_name: str) -> None: ...
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def rewind(self, step: int) -> None: ...
    def figure(self, name: str, png: Path) -> None: ...
    def summary(self, values: Mapping[str, Any]) -> None: ...
    def finish(self) -> str:
        """Nothing to say."""
        return ""


class JsonLinesTracker:
    """One JSON object a line: `{"time": ..., "step": ..., "train/loss": ...}`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._num_rows = 0

    def start(self, config: Mapping[str, Any], run_name: str) -> None:
        """Nothing to do: rows are appended to those that are there."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line."""
        append_jsonl(self.path, {"time": time.time(), "step": step, **metrics})
        self._num_rows += 1

    def rewind(self, step: int) -> None:
        """Rewrite the file, whole or not at all, without the rows later than this step."""
        if not self.path.exists():
            return
        rows = read_jsonl(self.path)
        kept = [row for row in rows if row.get("step", 0) <= step]
        if len(kept) < len(rows):
            write_jsonl(self.path, kept)

    def figure(self, name: str, png: Path) -> None:
        """Nothing to do: figures are files of the run folder."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing to do: final numbers are in the report."""

    def finish(self) -> str:
        """How many rows were written by this process."""
        return f"{self.path.name}: {self._num_rows} rows written."


class TrackerGroup:
    """Tells every tracker the same."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def start(self, config: Mapping[str, Any], run_name: str) -> None:
        """Begin all."""
        for tracker in self.trackers:
            tracker.start(config, run_name)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record with all."""
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def rewind(self, step: int) -> None:
        """Rewind all."""
        for tracker in self.trackers:
            tracker.rewind(step)

    def figure(self, name: str, png: Path) -> None:
        """Show with all."""
        for tracker in self.trackers:
            tracker.figure(name, png)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Sum up with all."""
        for tracker in self.trackers:
            tracker.summary(values)

    def finish(self) -> str:
        """The sentences of all."""
        return " ".join(filter(None, [tracker.finish() for tracker in self.trackers]))


def open_tracker(config: RunConfig, folder: RunFolder, is_main: bool) -> Tracker:
    """JSON lines and, unless disabled, Weights & Biases; nothing but on the main process."""
    if not is_main:
        return NullTracker()
    trackers: list[Tracker] = [JsonLinesTracker(folder.metrics)]
    mode = os.environ.get("WANDB_MODE") or config.wandb.mode
    mode = _WANDB_MODES.get(mode, mode)
    if mode != "disabled":
        trackers.append(WandbTracker(config.wandb, folder, mode=mode))
    return TrackerGroup(trackers)
