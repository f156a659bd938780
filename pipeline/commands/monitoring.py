"""`monitor`, `alerts`, `replay`: windows of production judged, what they raised, if it holds."""

import contextlib
import dataclasses
import getpass
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.shell import Run, as_json_text, folder_of, say
from pipeline.commands.windows import Judge, load_trained, replayed, tell
from pipeline.errors import InputError

if TYPE_CHECKING:
    from monitoring.monitor import MonitorOutcome

ALERT, DIFFERS = 3, 1
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def monitor(
    run: Run,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE|KEY=VALUE]...", help="More files; values on top."),
    ] = None,
    window: Annotated[
        list[Path] | None,
        typer.Option(help="Rows of one window: raw inputs, or scored rows. Repeatable."),
    ] = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option(help="Labels that came later: sample_id and label. Repeatable."),
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help="Judge every file that arrives in this folder.")
    ] = None,
    every: Annotated[str, typer.Option(help="How often --watch looks: 30s, 15m, 6h, 1d.")] = "15m",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge a window of production rows: exit code 0 if it is quiet, 3 if it raised an alert."""
    words = [(word, "=" in word and not Path(word).exists()) for word in more or ()]
    overrides = [word for word, is_override in words if is_override]
    files = [*(window or ()), *(Path(word) for word, is_override in words if not is_override)]
    _require_one_way(files, labels, watch)
    with Judge(run, overrides) as judge:
        if watch is not None:
            return _watch(judge, watch, _seconds(every))
        outcome = judge(files, labels or [])
    say(as_json_text(_as_json(outcome))) if as_json else say(*_lines(outcome))
    if outcome.alerts:
        raise typer.Exit(ALERT)


def alerts(
    run: Run,
    action: Annotated[str, typer.Argument(metavar="list|ack", help="What to do.")] = "list",
    alert: Annotated[str | None, typer.Argument(metavar="[ID]", help="Which, for ack.")] = None,
    by: Annotated[str | None, typer.Option(help="Who has seen it; by default, you.")] = None,
    note: Annotated[str, typer.Option(help="What came of it.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the alerts of a run, or acknowledge one."""
    if action not in ("list", "ack") or (action == "ack") != (alert is not None):
        raise InputError("Ask for `masklock alerts RUN list`, or for `masklock alerts RUN ack ID`.")
    folder = folder_of(run, load_trained(run))
    from monitoring.acknowledging import acknowledge, listed

    if alert is not None:
        seen = acknowledge(folder, alert, by or getpass.getuser(), note)
        say(f"{seen.id} {seen.state} by {(seen.acknowledged or {})['by']}")
        return
    rows = listed(folder)
    say(as_json_text(rows)) if as_json else say(*_table(rows))


def replay(
    alert: Annotated[Path, typer.Argument(metavar="ALERT.json", help="The file of an alert.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute the passes behind an alert once more: exit code 0 if all is equal, 1 if not."""
    from monitoring.alerts import read_alert
    from monitoring.replay import run_of

    raised, folder = read_alert(alert), run_of(alert)
    found = replayed(folder, raised)
    if as_json:
        say(as_json_text({"equal": found.equal, **vars(found)}))
    elif found.equal:
        say(
            f"equal: {found.num_scores} scores of {found.num_rows} rows, model, plan and masks, "
            f"bit for bit"
        )
    else:
        say(f"{len(found.differences)} differences:", *(f"  {one}" for one in found.differences))
    if not found.equal:
        raise typer.Exit(DIFFERS)


# -- watching ------------------------------------------------------------------------------------


def _watch(judge: Judge, folder: Path, every_seconds: float) -> None:
    from monitoring.watch import Watch

    def said_of(path: Path) -> str:
        return "\n".join(_lines(judge([path], [])))

    tell(f"Watching {folder} for windows; stop with Ctrl-C or SIGTERM.")
    with _stopped_by_signals() as stop:
        Watch(judge.folder, folder, every_seconds, said_of, judge.retry, say).until(stop)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set: the window at hand is finished first."""
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)([smhd])", text)
    if found is None or not int(found[1]):
        raise InputError(f"--every is a time such as 30s, 15m, 6h or 1d; found {text!r}.")
    return float(int(found[1]) * _UNITS[found[2]])


def _require_one_way(files: list[Path], labels: list[Path] | None, watch: Path | None) -> None:
    if bool(files) == (watch is not None):
        raise InputError("Name the files of one window (--window), or a folder to --watch.")
    if watch is not None and labels:
        raise InputError("--labels belong to one window: leave them out with --watch.")


# -- what is said --------------------------------------------------------------------------------


def _lines(outcome: "MonitorOutcome") -> list[str]:
    record = outcome.record
    count = _count(len(outcome.alerts), "alert") if outcome.alerts else "quiet"
    again = "" if outcome.is_new else f", judged before, at {record.created}"
    lines = [f"Window {record.id}: {record.num_rows} rows, {count}{again}"]
    for alert in outcome.alerts:
        lines += [
            f"  {alert.severity:8}  {alert.id}  {alert.title}",
            *([f"            {alert.runbook}"] if alert.runbook else []),
        ]
    failed = Counter((one.sink, one.error, one.state) for one in outcome.deliveries)
    lines += [
        f"  {_count(number, 'alert')} not sent to {sink}: {error}; {_what_next(state)}"
        for (sink, error, state), number in failed.items()
        if state != "sent"
    ]
    return lines + [f"  rule {name} is silent: no such measure" for name in outcome.silent_rules]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _what_next(state: str) -> str:
    return "given up" if state == "given up" else "tried again at the next run"


def _as_json(outcome: "MonitorOutcome") -> dict[str, Any]:
    return {
        "window": dataclasses.asdict(outcome.record),
        "is_new": outcome.is_new,
        "alerts": [alert.to_json() for alert in outcome.alerts],
        "deliveries": [dataclasses.asdict(one) for one in outcome.deliveries],
        "silent_rules": outcome.silent_rules,
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["No alerts."]
    return [
        f"{row['id']}  {row['created'][:16]}  {row['severity']:8}  {row['state']:12}  "
        f"{row['title']}{_repeated(row['num_repeats'])}{_undelivered(row['deliveries'])}"
        for row in rows
    ]


def _repeated(times: int) -> str:
    return f"  (and {times} more since)" if times else ""


def _undelivered(deliveries: dict[str, dict[str, Any]]) -> str:
    states = [
        f"{sink} {one['state']}" for sink, one in deliveries.items() if one["state"] != "sent"
    ]
    return f"  ({', '.join(states)})" if states else ""
