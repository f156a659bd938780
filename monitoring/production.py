"""What production did to a run, as pages show it: its state, alerts, windows and drift."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring import production_figures as figures
from monitoring import words
from monitoring.alerts import Alert
from monitoring.columns import TEXT
from monitoring.common_words import common_words, lengths
from monitoring.figures import Chart
from monitoring.history import History, WindowRecord
from monitoring.pages import render, shown
from monitoring.profile import read_profile
from monitoring.run import best_ood_score, is_number
from monitoring.scored_files import read_table
from pipeline.errors import RunFolderError
from pipeline.records import RunFolder, write_text

NUM_WINDOWS = 60
"""The latest ones are shown; the history keeps all."""
NUM_GRID_WINDOWS = 30
NUM_ALERTS = 50
NUM_ROWS = 5
_MAX_TEXT_CHARACTERS = 300


@dataclass(frozen=True)
class KeptWindow:
    """Of each row of a window: its text, and its length where there is one."""

    texts: list[str]
    lengths: list[float]


@dataclass(frozen=True)
class Production:
    """The history of a run as far as pages need it."""

    windows: list[WindowRecord]
    alerts: list[Alert]
    means: dict[str, float]
    """Of the reference, by column."""
    kept: dict[str, KeptWindow]
    """Texts and lengths of the windows behind the alerts that are shown, by their kept copy."""
    best_ood: str | None


def load_production(folder: RunFolder) -> Production | None:
    """The latest windows and alerts, those that repeat others left out; None before the first."""
    path = folder.monitoring / "history.sqlite"
    if not path.is_file():
        return None
    with History(path) as history:
        windows = history.windows(NUM_WINDOWS)
        alerts = history.alerts(limit=NUM_ALERTS, with_repeats=False)
    if not windows:
        return None
    means = {}
    if folder.profile.is_dir():
        numbers = read_profile(folder).numbers
        means = {name: summary.mean for name, summary in numbers.items() if summary.count}
    kept = _kept_windows(folder, alerts)
    return Production(windows, alerts, means, kept, best_ood_score(folder))


def _kept_windows(folder: RunFolder, alerts: list[Alert]) -> dict[str, KeptWindow]:
    """Alerts name rows by their place only: the rows themselves stay in this folder."""
    found = {}
    for name in {str(alert.window.get("kept")) for alert in alerts}:
        path = folder.monitoring / name
        if path.is_file():
            table = read_table(path)
            names = table.column_names
            texts = table[TEXT].to_pylist() if TEXT in names else [""] * len(table)
            lengths = table["num_tokens"].to_pylist() if "num_tokens" in names else []
            found[name] = KeptWindow([text or "" for text in texts], lengths)
    return found


def write_monitor_page(folder: RunFolder) -> Path:
    """Render monitor.html: production alone, for a screen on the wall.

    Raises:
        RunFolderError: no window has been judged yet.
    """
    production = load_production(folder)
    if production is None:
        raise RunFolderError(
            f"{folder.path} has no history of production yet. Judge a window first: "
            "`masklock monitor RUN --window FILES`."
        )
    content = {"name": folder.path.resolve().name, "production": content_of(production)}
    write_text(folder.monitor_html, render("monitor.html.j2", content))
    return folder.monitor_html


def content_of(production: Production) -> dict[str, Any]:
    """Everything the template shows."""
    windows, alerts = production.windows, production.alerts
    return {
        "state": _state(windows, alerts),
        "alerts": [
            _alert(alert, production.kept.get(str(alert.window.get("kept"))))
            for alert in reversed(alerts)
        ],
        "timeline": shown(figures.timeline(windows, alerts)),
        "charts": shown(_charts(production)),
        "grid": _grid(windows[-NUM_GRID_WINDOWS:]),
        "columns": _columns(windows),
        "performance": _performance(windows),
    }


def _charts(production: Production) -> list[Chart]:
    windows = production.windows
    watched = ["mutual_information", production.best_ood, "confidence", "perplexity"]
    return [
        *figures.detector_charts(windows),
        *figures.quality_charts(windows),
        *figures.mean_charts(windows, [name for name in watched if name], production.means),
    ]


def _state(windows: list[WindowRecord], alerts: list[Alert]) -> list[str]:
    """The sentences that someone who was called reads first."""
    last, open_alerts = windows[-1], [alert for alert in alerts if alert.state == "open"]
    sentences = [
        f"The last window, of {last.num_rows:,} rows, was judged {_when(last.created)}: "
        f"{'it raised an alert' if last.outcome == 'alert' else 'quiet'}."
    ]
    if open_alerts:
        worst = max(open_alerts, key=lambda alert: figures.RANK[alert.severity])
        count = f"{len(open_alerts)} alert{'s are' if len(open_alerts) > 1 else ' is'} open"
        sentences.append(f"{count}, the most serious {worst.severity}: {worst.title}.")
    else:
        sentences.append("No alert is open.")
    quiet = sum(window.outcome == "quiet" for window in windows)
    sentences.append(f"{quiet} of the last {len(windows)} windows were quiet.")
    return sentences


def _alert(alert: Alert, kept: KeptWindow | None) -> dict[str, Any]:
    evidence = {
        name: words.quantity(value) if isinstance(value, int | float) else value
        for name, value in alert.evidence.items()
        if isinstance(value, str | int | float)
    }
    return {
        "id": alert.id,
        "severity": alert.severity,
        "when": _when(alert.created),
        "title": alert.title,
        "runbook": alert.runbook,
        "rule": alert.rule,
        "state": alert.state,
        "acknowledged": alert.acknowledged or {},
        "evidence": evidence,
        "common": _common(alert, kept) if kept else {},
        "rows": [_row(row, kept) for row in alert.rows[:NUM_ROWS]],
        "num_rows": len(alert.rows),
    }


def _common(alert: Alert, kept: KeptWindow) -> dict[str, Any]:
    """Words and lengths of the rows behind an alert, against those of the other rows."""
    behind = {row["place"] for row in alert.rows}
    others = [place for place in range(len(kept.texts)) if place not in behind]
    words = common_words([kept.texts[p] for p in sorted(behind)], [kept.texts[p] for p in others])
    medians = None
    if kept.lengths:
        medians = lengths([kept.lengths[p] for p in behind], [kept.lengths[p] for p in others])
    return {"words": words, "lengths": medians}


def _row(row: dict[str, Any], kept: KeptWindow | None) -> dict[str, Any]:
    text = kept.texts[row["place"]] if kept else ""
    short = text[:_MAX_TEXT_CHARACTERS] + (" …" if len(text) > _MAX_TEXT_CHARACTERS else "")
    return {"sample_id": row.get("sample_id"), "value": row.get("value"), "text": short}


def _grid(windows: list[WindowRecord]) -> dict[str, Any]:
    """Columns by windows: how large each change was, of the smallest that counts."""
    judged = [(w, {c["column"]: c for c in w.details.get("columns", [])}) for w in windows]
    names = dict.fromkeys(name for _, found in judged for name in found)
    rows = [
        {"name": name, "cells": [_cell(w, found.get(name)) for w, found in judged]}
        for name in names
    ]
    moved = [row for row in rows if any(cell["drifted"] for cell in row["cells"])]
    rows = moved + [row for row in rows if row not in moved]
    return {"rows": rows, "num_moved": len(moved), "windows": [w.id for w in windows]}


def _cell(window: WindowRecord, column: dict[str, Any] | None) -> dict[str, Any]:
    column = column or {}
    effect, smallest = column.get("effect"), column.get("min_effect")
    known = is_number(effect)
    share = min(1.0, abs(effect or 0.0) / (3 * smallest)) if smallest else 0.0
    said = (
        f"effect {words.quantity(effect)} ({words.title_of(str(column.get('effect_name')))}), "
        f"adjusted p {words.quantity(column.get('adjusted_p_value'))}"
        if known
        else column.get("note") or "not judged"
    )
    return {
        "drifted": bool(column.get("drifted")),
        "share": share,
        "known": known,
        "title": f"window {window.id}, {_when(window.created)}: {said}",
    }


def _columns(windows: list[WindowRecord]) -> list[dict[str, Any]]:
    """The columns of the last window that was judged by columns; those that moved come first."""
    last = next((w for w in reversed(windows) if w.details.get("columns")), None)
    found = last.details["columns"] if last else []
    return sorted(found, key=lambda column: not column["drifted"])


def _performance(windows: list[WindowRecord]) -> list[tuple[str, dict[str, Any]]]:
    """Quality of the last window that says anything about it."""
    last = next((w for w in reversed(windows) if w.details.get("performance")), None)
    return list(last.details["performance"].items()) if last else []


def _when(created: str) -> str:
    return created.replace("T", " ").replace("+00:00", " UTC")
