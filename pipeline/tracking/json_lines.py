"""The truth about a run's numbers: one JSON object a line in `metrics.jsonl`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.exhibits import Exhibit, Notice
from pipeline.records import append_jsonl, read_jsonl, write_jsonl


class JsonLinesTracker:
    """`{"time": ..., "step": ..., "train/loss": ...}`; all but numbers is in files of its own."""

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

    def show(self, name: str, exhibit: Exhibit) -> None:
        """Nothing to do: pictures, bins and rows are in the evaluation's files."""

    def artifact(self, kind: str, path: Path) -> None:
        """Nothing to do: it is a file of the run folder."""

    def alert(self, notice: Notice) -> None:
        """Nothing to do: alerts have a history and files of their own."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing to do: final numbers are in the report."""

    def finish(self) -> str:
        """How many rows were written by this process."""
        return f"{self.path.name}: {self._num_rows} rows written."
