"""Files behind alerts: their own, and copies of the windows that raised them, for a replay."""

import io
from pathlib import Path

import pyarrow.parquet as pq

from monitoring.alerts import write_alert
from monitoring.history import History
from monitoring.scored import Window
from pipeline.errors import HistoryError
from pipeline.records import RunFolder, write_bytes

KEPT = "windows"
"""Folder, in that of monitoring, of the copies of windows."""


def kept_name(sha256: str, is_labelled: bool) -> str:
    """Name of the copy of a window of this content."""
    return f"{sha256[:16]}{'-labelled' if is_labelled else ''}.parquet"


def keep_window(window: Window, path: Path) -> None:
    """A copy of the rows, so that an alert can be replayed when its files are gone."""
    buffer = io.BytesIO()
    pq.write_table(window.table, buffer)
    try:
        write_bytes(path, buffer.getvalue())
    except OSError as error:
        raise HistoryError(
            f"The rows behind an alert were to be kept in {path}, but: {error.strerror}. Nothing "
            f"was recorded; run again once there is room."
        ) from None


def write_missing_alerts(run: RunFolder, history: History) -> None:
    """Files of alerts that lack theirs: the history may be ahead of them after a crash."""
    folder = run.monitoring / "alerts"
    try:
        for id in history.alert_ids():
            if not (folder / f"{id}.json").is_file():
                write_alert(folder, history.alert(id))
    except OSError as error:
        raise HistoryError(
            f"The window is recorded, but {folder} could not be written: {error.strerror}. The "
            f"next run writes what is missing."
        ) from None


def forget_old_windows(run: RunFolder, num_kept: int, history: History) -> None:
    """Copies of windows but for the newest, and for those of open alerts."""
    is_open = {kept_name(*window) for window in history.open_windows()}
    copies = sorted(
        (run.monitoring / KEPT).glob("*.parquet"), key=lambda path: -path.stat().st_mtime_ns
    )
    for old in copies[num_kept:]:
        if old.name not in is_open:
            old.unlink(missing_ok=True)
