"""What triggers look at: windows that monitoring judged, and files with new labels."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitoring.history import History, WindowRecord
from pipeline.config.monitoring import SEVERITIES
from pipeline.errors import DataError
from pipeline.records import RunFolder

HISTORY = "history.sqlite"


@dataclass(frozen=True)
class WindowFact:
    """One judged window: how serious its worst alert is, and its measures."""

    id: int
    sha256: str
    created: str
    severity: str | None = None
    """None: quiet."""
    alerts: tuple[str, ...] = ()
    measures: dict[str, float] = field(default_factory=dict)

    def is_at_least(self, severity: str) -> bool:
        """Whether an alert of this severity, or a graver one, was raised."""
        return self.severity is not None and _rank(self.severity) >= _rank(severity)

    def to_json(self) -> dict[str, Any]:
        """What is kept as evidence."""
        return {
            "id": self.id,
            "sha256": self.sha256,
            "created": self.created,
            "severity": self.severity,
            "alerts": list(self.alerts),
        }


def history_of(run: RunFolder) -> Path:
    """Where monitoring keeps the windows of a run."""
    return run.monitoring / HISTORY


def read_windows(path: Path, after: int = 0, limit: int = 200) -> list[WindowFact]:
    """The last windows with an id above `after`, oldest first; none where there is no history.

    A window that was judged again, when its labels came, counts once, as it was judged last.
    """
    if not path.exists():
        return []
    with History(path) as history:
        records = {record.sha256: record for record in history.windows(limit)}
        return [_fact(history, r) for r in records.values() if r.id is not None and r.id > after]


def _fact(history: History, record: WindowRecord) -> WindowFact:
    assert record.id is not None
    alerts = history.alerts(window=record.id) if record.outcome == "alert" else []
    worst = max((alert.severity for alert in alerts), key=_rank, default=None)
    ids = tuple(alert.id for alert in alerts)
    measures = dict(record.measures)
    return WindowFact(record.id, record.sha256, record.created, worst, ids, measures)


def _rank(severity: str) -> int:
    return [*SEVERITIES].index(severity) if severity in SEVERITIES else -1


def files_of(patterns: Sequence[str]) -> list[Path]:
    """The files that patterns name, sorted, each once.

    Raises:
        DataError: a plain name stands for no file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matching = sorted(glob.glob(pattern, recursive=True))
        if not matching and not glob.has_magic(pattern):
            raise DataError(f"data.new names {pattern}, but there is no such file.")
        found.update(dict.fromkeys(Path(name) for name in matching if Path(name).is_file()))
    return list(found)


def count_rows(path: Path) -> int:
    """Rows of a file; of text files their lines that hold something."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return int(parquet.read_metadata(path).num_rows)
    with open(path, "rb") as file:
        lines = sum(1 for line in file if line.strip())
    return max(lines - 1, 0) if path.suffix == ".csv" else lines
