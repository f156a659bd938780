"""What people do with alerts: look at them, and say that they have seen them."""

from datetime import datetime
from pathlib import Path
from typing import Any

from monitoring.alerts import Alert, utc_now, write_alert
from monitoring.history import History
from pipeline.errors import DataError
from pipeline.records import RunFolder


def newest_alerts(run: RunFolder, limit: int) -> list[Alert]:
    """The last alerts of a run, oldest first."""
    if not _path(run).is_file():
        return []
    with History(_path(run)) as history:
        return history.alerts(limit=limit)


def listed(run: RunFolder) -> list[dict[str, Any]]:
    """The alerts of a run, newest first, repeats counted, and how far each has come."""
    if not _path(run).is_file():
        return []
    with History(_path(run)) as history:
        alerts, repeats = history.alerts(with_repeats=False), history.num_repeats()
        deliveries: dict[str, dict[str, dict[str, Any]]] = {}
        for one in history.deliveries():
            state = {"state": one.state, "attempts": one.attempts, "error": one.error}
            deliveries.setdefault(one.alert, {})[one.sink] = state
    return [
        {
            "id": alert.id,
            "created": alert.created,
            "severity": alert.severity,
            "state": alert.state,
            "title": alert.title,
            "runbook": alert.runbook,
            "num_repeats": repeats.get(alert.id, 0),
            "acknowledged": alert.acknowledged,
            "file": str(run.monitoring / "alerts" / f"{alert.id}.json"),
            "deliveries": deliveries.get(alert.id, {}),
        }
        for alert in reversed(alerts)
    ]


def acknowledge(run: RunFolder, id: str, who: str, note: str, now: datetime | None = None) -> Alert:
    """Mark an alert and its repeats as seen, in the history and in their files.

    The first acknowledgement stands.

    Args:
        run: the run.
        id: of the alert, or how it begins.
        who: has seen it.
        note: what came of it.
        now: the time, UTC.

    Raises:
        DataError: no alert, or more than one, has an id that begins so.
    """
    if not _path(run).is_file():
        raise DataError(f"{run.path} has no alerts: no window of it was ever judged.")
    with History(_path(run)) as history:
        marked = history.acknowledge(id, who, note, now or utc_now())
    for alert in marked:
        write_alert(run.monitoring / "alerts", alert)
    return marked[0]


def _path(run: RunFolder) -> Path:
    return run.monitoring / "history.sqlite"
