"""What triggers look at: windows that monitoring judged, and files with new labels."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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

    Labels that come later are judged as a record of their own; both are one window here.
    """
    if not path.exists():
        return []
    merged: dict[str, WindowFact] = {}
    with History(path) as history:
        for record in history.windows(limit):
            if record.id is not None and record.id > after:
                fact = _fact(history, record)
                known = merged.get(fact.sha256)
                merged[fact.sha256] = fact if known is None else _joined(known, fact)
    return list(merged.values())


def _fact(history: History, record: WindowRecord) -> WindowFact:
    assert record.id is not None
    alerts = history.alerts(window=record.id) if record.outcome == "alert" else []
    worst = max((alert.severity for alert in alerts), key=_rank, default=None)
    ids = tuple(alert.id for alert in alerts)
    measures = dict(record.measures)
    return WindowFact(record.id, record.sha256, record.created, worst, ids, measures)


def _joined(first: WindowFact, second: WindowFact) -> WindowFact:
    """In the place of the first, with what the second adds."""
    worst = max((one.severity for one in (first, second)), key=lambda name: _rank(name or ""))
    return replace(
        first,
        id=second.id,
        severity=worst,
        alerts=first.alerts + second.alerts,
        measures=first.measures | second.measures,
    )


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
            raise DataError(f"The policy names the rows in {pattern}, but there is no such file.")
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
