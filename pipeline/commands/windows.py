"""One window of a run: raw rows scored by `pipeline`, judged by `monitoring`, and replayed.

What the two halves do not know of each other is joined here.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipeline.commands.shell import folder_of, stdout_for_data
from pipeline.errors import DataError

if TYPE_CHECKING:
    from monitoring.alerts import Alert
    from monitoring.monitor import MonitorOutcome
    from monitoring.replay import Replay
    from monitoring.scored import Window
    from pipeline.config.schema import RunConfig
    from pipeline.records import RunFolder
    from pipeline.tracking import Tracker

SCORED = {"sample_id", "predictive_entropy"}
"""Columns that tell scored rows from raw ones."""


def load_trained(run: str, overrides: Sequence[str] = ()) -> "RunConfig":
    """A run's configuration; what only torch and peft know of it, its training has checked."""
    from pipeline.config.load import load_config

    return load_config(run, overrides, check_installed=False)


class Judge:
    """A run, opened once for all windows that it will judge."""

    def __init__(self, run: str, overrides: list[str]) -> None:
        self.config = load_trained(run, overrides)
        self.folder = folder_of(run, self.config)
        from monitoring.receivers import receivers_of
        from pipeline.tracking import wandb_mode

        wandb = None if wandb_mode(self.config) == "disabled" else self._alert_by_wandb
        self.receivers = receivers_of(self.config.monitoring.sinks, self.folder, wandb)

    @functools.cached_property
    def tracker(self) -> "Tracker":
        """Opened by the first window that is judged, or alert that is sent."""
        from pipeline.tracking import open_window_tracker

        tracker = open_window_tracker(self.config, self.folder)
        tracker.start(self.config.model_dump(mode="json"), self.config.name)
        return tracker

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *error: object) -> None:
        if "tracker" in vars(self):
            tell(self.tracker.finish())

    def _alert_by_wandb(self, alert: Mapping[str, Any]) -> None:
        from pipeline.tracking import wandb_sink

        wandb_sink(self.tracker)(alert)

    def __call__(self, files: list[Path], labels: list[Path]) -> "MonitorOutcome":
        """Judge one window, raw files scored first."""
        if _are_scored(files):
            from monitoring.scored import read_window

            return self._judge(read_window(files, labels))
        return self._judge_raw(files, labels)

    def retry(self) -> None:
        """Send what could not be sent before."""
        from monitoring.monitor import deliver

        deliver(self.folder, self.config, self.receivers)

    def _judge_raw(self, files: list[Path], labels: list[Path]) -> "MonitorOutcome":
        """The window keeps the names and hash of the raw files: it is known again unscored."""
        from monitoring.monitor import known_outcome
        from monitoring.scored import read_window, sha256_of
        from pipeline.evaluation.score import score

        sha256 = sha256_of(files)
        if not labels and (known := known_outcome(self.folder, sha256)) is not None:
            self.retry()
            return known
        output = self.folder.monitoring / f"scoring-{os.getpid()}.parquet"
        try:
            score(self.folder, self.config, files, output, tell)
            window = read_window([output], labels)
        finally:
            output.unlink(missing_ok=True)
        return self._judge(dataclasses.replace(window, paths=tuple(files), sha256=sha256))

    def _judge(self, window: "Window") -> "MonitorOutcome":
        from monitoring.monitor import monitor as judge

        digest = functools.partial(masks_digest_of, self.folder)
        outcome = judge(self.folder, self.config, window, self.receivers, masks_digest=digest)
        if outcome.is_new:
            self._show(window, outcome)
        return outcome

    def _show(self, window: "Window", outcome: "MonitorOutcome") -> None:
        """monitor.html anew; a row, curves beside the reference, and the newest of all alerts."""
        from monitoring.acknowledging import newest_alerts
        from monitoring.dashboards.window import alert_table, window_curves, window_row
        from monitoring.production import write_monitor_page
        from monitoring.profile import read_profile

        write_monitor_page(self.folder)
        assert outcome.record.id is not None
        row = window_row(outcome.record.measures, len(outcome.alerts))
        self.tracker.log(row, outcome.record.id)
        for name, curve in window_curves(read_profile(self.folder), window).items():
            self.tracker.show(name, curve)
        self.tracker.show("monitor/alerts", alert_table(newest_alerts(self.folder, 1000)))


def _are_scored(files: list[Path]) -> bool:
    from monitoring.scored_files import read_table

    tables = {path: read_table(path) for path in files}
    if empty := [str(path) for path, table in tables.items() if not table.num_rows]:
        raise DataError(
            f"A window needs at least one row, but there is none in {', '.join(empty)}."
        )
    scored = {path: SCORED <= set(table.column_names) for path, table in tables.items()}
    if len(set(scored.values())) > 1:
        raise DataError(
            "A window is raw rows or scored ones, but of these files some are scored, others raw: "
            + ", ".join(
                f"{path} ({'scored' if is_so else 'raw'})" for path, is_so in scored.items()
            )
        )
    return all(scored.values())


def masks_digest_of(folder: "RunFolder", replay: Mapping[str, Any], samples: list[int]) -> str:
    """Hash of the masks that the passes behind an alert drew for these samples."""
    from pipeline.dropout.lookup import masks_digest

    return masks_digest(folder, replay["seed"], replay["num_mc_passes"], samples)


def replayed(folder: "RunFolder", alert: "Alert") -> "Replay":
    """The alert's rows, scored once more in the batches of the first time."""
    from monitoring.replay import compare, kept_rows
    from pipeline.dropout.plan import DropoutPlan
    from pipeline.evaluation.score import as_scored, rescore
    from pipeline.trained import model_version

    rows, before = kept_rows(folder, alert), alert.replay
    config = as_scored(load_trained(str(folder.path)), before)
    with stdout_for_data():
        again = rescore(folder, config, rows, [row["place"] for row in alert.rows])
    now = {
        "model_version": model_version(folder),
        "plan_digest": DropoutPlan.read(folder.plan).digest,
        "masks_digest": masks_digest_of(folder, before, [row["sample_id"] for row in alert.rows]),
    }
    return compare(alert, {name: before[name] for name in now if name in before}, now, again)


def tell(sentence: str) -> None:
    """Say it on stderr: stdout is for what was asked."""
    if sentence:
        typer.echo(sentence, err=True)
