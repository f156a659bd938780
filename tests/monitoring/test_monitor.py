"""One window after the other: quiet ones, drift, labels that come later, the same window twice."""

from datetime import UTC, datetime, timedelta

import pytest

from monitoring.history import History
from monitoring.monitor import monitor
from monitoring.outbox import Receiver
from monitoring.scored import read_window
from pipeline.config.load import load_config

START = datetime(2026, 5, 4, tzinfo=UTC)


@pytest.fixture
def judge(watched_run, write_scored):
    """Judges a made-up window of `watched_run`, one an hour."""
    told, hour = [], iter(range(100))

    def one(name, overrides=(), labels=(), **options):
        window = read_window([write_scored(f"{name}.parquet", **options)], labels)
        config = load_config(watched_run.path, ["monitoring.drift.num_permutations=50", *overrides])
        time = START + timedelta(hours=next(hour))
        return monitor(watched_run, config, window, {"a": Receiver(told.append)}, lambda: time)

    one.told = told
    return one


@pytest.fixture
def history(watched_run):
    with History(watched_run.monitoring / "history.sqlite") as opened:
        yield opened


def test_windows_like_the_reference_are_quiet(judge, history):
    outcomes = [judge(f"quiet-{seed}", seed=seed) for seed in range(8)]
    assert [outcome.record.outcome for outcome in outcomes] == ["quiet"] * 8
    assert judge.told == []
    assert [window.id for window in history.windows()] == list(range(1, 9))


def test_a_window_of_strange_rows_raises_alerts_with_their_rows(judge):
    outcome = judge("strange", seed=1, moved=1, share=0.3)
    sounded = {alert.rule: alert for alert in outcome.alerts}
    alert = sounded["sequential/out_of_distribution"]
    assert alert.column in ("mahalanobis", "energy")
    assert alert.severity == "critical"
    assert len(alert.rows) == 20
    assert alert.rows[0]["value"] >= alert.rows[1]["value"] > 2
    assert alert.runbook
    assert [one["id"] for one in judge.told] == [one.id for one in outcome.alerts]
