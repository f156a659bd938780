"""Judges one window of production rows: the table of contents of monitoring.

read what the evaluation learned -> compare -> sequential detectors and rules -> alerts
-> one transaction in the history -> files of the alerts -> tell who is to be told
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from monitoring import columns
from monitoring.alert_files import forget_old_windows, keep_window, write_missing_alerts
from monitoring.alerts import Alert, stamp, utc_now
from monitoring.detectors import Detector, DetectorResult, detectors_of, update
from monitoring.drift import DriftSettings, WindowDrift, judge_window
from monitoring.history import Delivery, History, WindowRecord
from monitoring.measures import measures_of, reference_measures
from monitoring.outbox import Outbox, Receiver
from monitoring.profile import ReferenceProfile, read_profile
from monitoring.raising import Raiser
from monitoring.rules import NUM_BASELINE_WINDOWS, broken_rules, silent_rules
from monitoring.run import best_ood_score
from monitoring.scored import Window, require_matches
from pipeline.config.monitoring import DriftConfig, MonitoringConfig
from pipeline.config.schema import RunConfig
from pipeline.locking import file_lock
from pipeline.records import RunFolder

Clock = Callable[[], datetime]
MasksDigest = Callable[[Mapping[str, Any], list[int]], str]
"""Hash of the masks of the passes over these samples, from `Alert.replay`."""
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class MonitorOutcome:
    """What one window gave."""

    record: WindowRecord
    alerts: list[Alert]
    deliveries: list[Delivery]
    """What was tried in this run, of earlier alerts too."""
    silent_rules: list[str]
    """Rules of the user's own that found no measure of their name."""
    is_new: bool = True
    """False where this window had been judged before: nothing was recorded again."""


def monitor(
    run: RunFolder,
    config: RunConfig,
    window: Window,
    receivers: Mapping[str, Receiver] | None = None,
    now: Clock = utc_now,
    masks_digest: MasksDigest | None = None,
) -> MonitorOutcome:
    """Judge one window against the run's profile, record it, raise and send alerts.

    A window that the history knows is not judged again: its outcome of then is returned. Labels
    that arrive later for a known window are judged by themselves.

    Raises:
        DataError: the window cannot be compared with the profile; nothing is recorded.
        RunFolderError: there is no profile, or one that is damaged.
        HistoryError: it could not be recorded; nothing is.
        BusyError: another process has been judging windows of this run all the time.
    """
    with (
        file_lock(run.monitoring / "lock", PATIENCE_SECONDS, f"windows of {run.path}"),
        History(run.monitoring / "history.sqlite") as history,
    ):
        outbox = Outbox(history, receivers or {}, config.monitoring, now)
        try:
            known = _known(history, window.sha256, _is_labelled(window))
            outcome = known or _judge(run, config, window, outbox, masks_digest)
            write_missing_alerts(run, history)
            forget_old_windows(run, config.monitoring.keep_windows, history)
        finally:
            tried = outbox.deliver()
    return replace(outcome, deliveries=tried)


def known_outcome(run: RunFolder, sha256: str) -> MonitorOutcome | None:
    """What was found when a window of this content was judged before, if it was."""
    with History(run.monitoring / "history.sqlite") as history:
        return _known(history, sha256, False)


def _known(history: History, sha256: str, is_labelled: bool) -> MonitorOutcome | None:
    for labelled in {is_labelled, True}:
        if (record := history.window(sha256, labelled)) is not None:
            return MonitorOutcome(record, history.alerts(window=record.id), [], [], is_new=False)
    return None


def _judge(
    run: RunFolder,
    config: RunConfig,
    window: Window,
    outbox: Outbox,
    masks_digest: MasksDigest | None,
) -> MonitorOutcome:
    history, settings = outbox.history, config.monitoring
    profile = read_profile(run)
    require_matches(window, profile)
    only_labels = history.window(window.sha256, False) is not None
    drift = judge_window(profile, window, drift_settings(settings.drift, config.seed))
    detectors = detectors_of(settings.sequential, profile, best_ood_score(run))
    results = update(_of_labels(detectors, only_labels), window, history.detector_state)
    record = _record(window, drift, profile, only_labels, results, outbox.now())
    past = _comparable(history, record, settings)
    reference = reference_measures(profile, drift)
    findings = broken_rules(settings.rules, [*past, record], reference)
    raiser = Raiser(config.name, settings, profile, window, record, drift)
    alerts = [*raiser.of_detectors(results), *raiser.of_rules(findings)]
    if masks_digest is not None:
        alerts = [_with_masks(alert, masks_digest) for alert in alerts]
    alerts = outbox.marked(alerts)
    record = replace(record, outcome="alert" if alerts else "quiet")
    if alerts:
        keep_window(window, run.monitoring / raiser.kept)
    states = {name: one.state for name, one in results.items()}
    id = history.add_window(record, states, alerts, outbox.plan(alerts))
    return MonitorOutcome(replace(record, id=id), alerts, [], silent_rules(settings.rules, record))


def deliver(
    run: RunFolder, config: RunConfig, receivers: Mapping[str, Receiver], now: Clock = utc_now
) -> list[Delivery]:
    """Send what is due, without judging anything; returns what was tried."""
    with (
        file_lock(run.monitoring / "lock", PATIENCE_SECONDS, f"windows of {run.path}"),
        History(run.monitoring / "history.sqlite") as history,
    ):
        return Outbox(history, receivers, config.monitoring, now).deliver()


def _with_masks(alert: Alert, masks_digest: MasksDigest) -> Alert:
    if not alert.replay:
        return alert
    digest = masks_digest(alert.replay, [row["sample_id"] for row in alert.rows])
    return replace(alert, replay=alert.replay | {"masks_digest": digest})


def drift_settings(config: DriftConfig, seed: int) -> DriftSettings:
    """The settings of a configuration; the permutations follow from the run's seed."""
    return DriftSettings(**config.model_dump(), seed=seed)


def _is_labelled(window: Window) -> bool:
    return any(label is not None for label in window.labels())


def _of_labels(detectors: Mapping[str, Detector], only_labels: bool) -> dict[str, Detector]:
    """All detectors; for labels of a known window those that look at nothing else."""
    return {
        name: one
        for name, one in detectors.items()
        if one.column in columns.LABELLED or not only_labels
    }


def _record(
    window: Window,
    drift: WindowDrift,
    profile: ReferenceProfile,
    only_labels: bool,
    results: Mapping[str, DetectorResult],
    now: datetime,
) -> WindowRecord:
    measures = measures_of(window, drift, only_labels)
    measures |= {f"drift/sequential/{name}": one.statistic for name, one in results.items()}
    return WindowRecord(
        sha256=window.sha256,
        created=stamp(now),
        num_rows=window.num_rows,
        outcome="quiet",
        labelled=_is_labelled(window),
        model_version=profile.model_version,
        paths=[str(path) for path in window.paths],
        measures=measures,
        details=drift.to_json(),
    )


def _comparable(
    history: History, record: WindowRecord, config: MonitoringConfig
) -> list[WindowRecord]:
    """Windows before this one that rules may look at: of the same model."""
    longest = max((rule.of_windows for rule in config.rules.values()), default=1)
    before = history.windows(2 * (longest + NUM_BASELINE_WINDOWS))
    return [one for one in before if one.model_version == record.model_version]
