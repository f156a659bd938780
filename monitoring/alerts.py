"""What an alert is: severity, evidence, the rows behind it, what to do, and how to replay it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.config.monitoring import SEVERITIES, Severity
from pipeline.errors import DataError
from pipeline.records import write_json

SCHEMA = "masklock-alert-v1"
State = Literal["open", "acknowledged"]


@dataclass(frozen=True)
class Alert:
    """One alert, as in monitoring/alerts/<id>.json, in the history, and as sinks are sent it."""

    id: str
    """Hash of run, window, rule and column: the same window judged twice is the same alert."""
    run: str
    model_version: str | None
    created: str
    """UTC, ISO 8601."""
    severity: Severity
    rule: str
    """Name of the rule, or `sequential/NAME` of an e-detector."""
    title: str
    """One sentence."""
    column: str | None = None
    """The measure or column that it is about."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """The numbers that broke the rule, and its bounds."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Most extreme rows: `sample_id`, `place` in the window, `value`."""
    window: dict[str, Any] = field(default_factory=dict)
    """`paths`, `sha256`, `num_rows`, and `kept`: the copy in monitoring/windows/."""
    runbook: str = ""
    """One line: what to do."""
    replay: dict[str, Any] = field(default_factory=dict)
    """`seed`, `num_mc_passes`, `plan_digest`, `batch_size`, `scores`: for a replay."""
    repeats: str | None = None
    """The id of an earlier alert about the same, of which people were told lately."""
    state: State = "open"
    acknowledged: dict[str, Any] | None = None
    """`by`, `at`, `note`."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back equal."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Alert":
        """The alert of `to_json`; what later versions may add is passed over."""
        known = {one.name for one in dataclasses.fields(cls)}
        return cls(**{name: item for name, item in value.items() if name in known})

    @property
    def subject(self) -> str:
        """What people are told of once in a while: the rule and its measure."""
        return f"{self.rule} {self.evidence.get('metric')}"

    def is_at_least(self, severity: Severity) -> bool:
        """Whether this alert is as serious as `severity`, or more."""
        return SEVERITIES.index(self.severity) >= SEVERITIES.index(severity)


def alert_id(run: str, window_sha256: str, rule: str, column: str | None = None) -> str:
    """The id of an alert: 16 hexadecimal digits that depend on nothing but these."""
    text = json.dumps([run, window_sha256, rule, column])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def utc_now() -> datetime:
    """The clock of everything here, unless a test gives another."""
    return datetime.now(UTC)


def stamp(time: datetime) -> str:
    """A time as text that sorts as the times do: UTC, ISO 8601, to the second."""
    return time.astimezone(UTC).isoformat(timespec="seconds")


def write_alert(folder: Path, alert: Alert) -> Path:
    """Write `<id>.json` into a folder, whole or not at all."""
    path = folder / f"{alert.id}.json"
    write_json(path, alert.to_json())
    return path


def read_alert(path: str | Path) -> Alert:
    """The alert in a file.

    Raises:
        DataError: it is missing, no JSON, or no alert of this version.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} was to hold an alert, but it cannot be read: {error}") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{path} was to hold an alert ({SCHEMA}), but it holds {found!r}. "
            f"Alerts are in the folder monitoring/alerts/ of a run."
        )
    try:
        return Alert.from_json(value)
    except TypeError as error:
        raise DataError(f"{path} is no whole alert: {error}") from None
