"""One window after the other: quiet ones, drift, labels that come later, the same window twice."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pyarrow.parquet as pq
import pytest

from monitoring.alerts import read_alert
from monitoring.history import History
from monitoring.monitor import monitor
from monitoring.outbox import Receiver
from monitoring.receivers import receivers_of
from monitoring.scored import read_window
from monitoring.sinks import DeliveryError
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.errors import DataError, HistoryError
from pipeline.records import read_jsonl

START = datetime(2026, 5, 4, tzinfo=UTC)
QUICK = "monitoring.drift.num_permutations=50"


@pytest.fixture
def judge(watched_run, write_scored):
    """Judges a made-up window of `watched_run`, one an hour."""
    told, hour = [], iter(range(100))

    def one(name, overrides=(), labels=(), hours=None, **options):
        window = read_window([write_scored(f"{name}.parquet", **options)], labels)
        config = load_config(watched_run.path, [QUICK, *overrides])
        time = START + timedelta(hours=next(hour) if hours is None else hours)
        return monitor(watched_run, config, window, {"a": Receiver(told.append)}, lambda: time)

    one.told = told
    return one


@pytest.fixture
def history(watched_run):
    with History(watched_run.monitoring / "history.sqlite") as opened:
        yield opened


def test_windows_like_the_reference_are_quiet(judge, history):
    outcomes = [judge(f"quiet-{seed}", seed=seed) for seed in range(5)]
    assert [outcome.record.outcome for outcome in outcomes] == ["quiet"] * 5
    assert judge.told == []
    assert [window.id for window in history.windows()] == list(range(1, 6))


def test_a_window_of_strange_rows_raises_alerts_with_their_rows(judge, watched_run):
    outcome = judge("strange", seed=1, moved=1, share=0.3)
    alert = {alert.rule: alert for alert in outcome.alerts}["sequential/out_of_distribution"]
    assert (alert.severity, alert.column) == ("critical", "mahalanobis")
    assert len(alert.rows) == 20
    table = pq.read_table(watched_run.monitoring / alert.window["kept"])
    largest = sorted(table["mahalanobis"].to_pylist(), reverse=True)[:20]
    assert [row["value"] for row in alert.rows] == largest
    assert [table["sample_id"][row["place"]].as_py() for row in alert.rows] == [
        row["sample_id"] for row in alert.rows
    ]
    assert alert.replay["scores"]["mahalanobis"] == largest
    assert alert.runbook
    assert [one["id"] for one in judge.told] == [one.id for one in outcome.alerts]


def test_every_alert_has_a_file_which_is_written_again_if_it_is_lost(judge, watched_run):
    folder = watched_run.monitoring / "alerts"
    alerts = judge("strange", seed=1, moved=1).alerts
    assert [read_alert(folder / f"{alert.id}.json") for alert in alerts] == alerts
    shutil.rmtree(folder)
    judge("quiet", seed=2)
    assert len(list(folder.iterdir())) == len(alerts)


def test_the_same_window_twice_is_judged_and_told_once(judge, history):
    first = judge("strange", seed=1, moved=1)
    state = history.detector_state("doubt")
    again = judge("strange-copy", seed=1, moved=1)
    assert not again.is_new
    assert again.alerts == first.alerts
    assert history.detector_state("doubt") == state
    assert len(history.windows()) == 1
    assert len(judge.told) == len(first.alerts)


def test_labels_that_come_later_are_judged_by_themselves(judge, history, tmp_path, scored_rows):
    judge("today", seed=1)
    states = {name: history.detector_state(name) for name in ("uncertainty", "doubt", "error")}
    table = scored_rows(seed=1, labelled=True).select(["sample_id", "label"])
    wrong = table.set_column(1, "label", [["json"] * table.num_rows])
    pq.write_table(wrong, tmp_path / "labels.parquet")
    later = judge("today", seed=1, labels=[tmp_path / "labels.parquet"])
    assert later.is_new
    assert "sequential/error" in {alert.rule for alert in later.alerts}
    assert all(
        any(word in key for word in ("performance", "label", "correct", "sequential/error"))
        for key in later.record.measures
    )
    assert history.detector_state("error") != states["error"]
    for name in ("uncertainty", "doubt"):
        assert history.detector_state(name) == states[name]
    assert not judge("today", seed=1, labels=[tmp_path / "labels.parquet"]).is_new
    assert not judge("today", seed=1).is_new


def test_a_window_that_cannot_be_judged_leaves_no_trace_and_stops_no_delivery(
    watched_run, write_scored, history, scored_rows
):
    config = load_config(watched_run.path, [QUICK])
    told = []

    def away(alert):
        raise DeliveryError("away")

    strange = read_window([write_scored(seed=1, moved=1)])
    raised = monitor(watched_run, config, strange, {"ops": Receiver(away)}).alerts
    poor = write_scored("poor.parquet", seed=2)
    pq.write_table(scored_rows(seed=2).drop_columns(["confidence"]), poor)
    with pytest.raises(DataError, match="no column 'confidence'"):
        monitor(watched_run, config, read_window([poor]), {"ops": Receiver(told.append)})
    assert len(history.windows()) == 1
    assert [one["id"] for one in told] == [alert.id for alert in raised]


def test_columns_that_stay_away_alert_at_the_second_window(judge):
    rules = ["monitoring.sequential.detectors.clicks.column=clicks"]
    options = {"moved": 0.3, "num_rows": 400, "overrides": rules}
    sounded = [{one.rule for one in judge(f"{n}", seed=n, **options).alerts} for n in (1, 2)]
    assert ["columns_drifted" in rules for rules in sounded] == [False, True]


def test_a_rule_on_a_column_of_the_user_fires_and_a_typo_is_named(judge):
    few = "monitoring.rules.few={metric: drift/clicks/mean, below: 25, severity: critical}"
    typo = "monitoring.rules.typo={metric: drift/clickz/mean, below: 25}"
    outcome = judge("one", [few, typo], seed=1)
    [alert] = outcome.alerts
    assert (alert.rule, alert.column, alert.severity) == ("few", "clicks", "critical")
    assert alert.title.startswith("few: drift/clicks/mean is 19.84, below 25")
    assert alert.rows[0]["value"] == min(row["value"] for row in alert.rows)
    assert outcome.silent_rules == ["typo"]


def test_a_clock_that_goes_backwards_changes_no_judgement(judge, history):
    for hours, seed in ((10, 1), (2, 2), (5, 3)):
        judge(f"{seed}", seed=seed, hours=hours)
    assert [window.created[11:13] for window in history.windows()] == ["10", "02", "05"]
    assert [window.id for window in history.windows()] == [1, 2, 3]


def test_windows_judged_at_once_take_turns_and_no_state_is_lost(judge, history):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: judge(f"{seed}", seed=seed), range(1, 5)))
    assert [window.id for window in history.windows()] == [1, 2, 3, 4]
    assert history.detector_state("doubt")["state"]["num_runs"] == 4


def test_copies_of_windows_are_kept_for_open_alerts_and_the_newest_others(judge, watched_run):
    for seed in (1, 2, 3):
        judge(f"{seed}", ["monitoring.keep_windows=1"], seed=seed, moved=1)
    kept = watched_run.monitoring / "windows"
    assert len(list(kept.iterdir())) == 3
    with History(watched_run.monitoring / "history.sqlite") as history:
        for alert in history.alerts():
            history.acknowledge(alert.id, "ann", "", START)
    judge("4", ["monitoring.keep_windows=1"], seed=4)
    assert len(list(kept.iterdir())) == 1


def test_a_copy_that_cannot_be_kept_leaves_no_window_half_recorded(judge, watched_run, history):
    in_the_way = watched_run.monitoring / "windows"
    in_the_way.touch()
    with pytest.raises(HistoryError, match="Nothing was recorded; run again"):
        judge("strange", seed=1, moved=1)
    assert history.windows() == history.alerts() == judge.told == []
    in_the_way.unlink()
    assert judge("strange", seed=1, moved=1).alerts


KILLER = """
import sys
from pathlib import Path
from monitoring.monitor import monitor
from monitoring.receivers import receivers_of
from monitoring.scored import read_window
from pipeline.config.load import load_config
from pipeline.records import RunFolder
run = RunFolder(sys.argv[1])
config = load_config(run.path, sys.argv[3:])
monitor(run, config, read_window([Path(sys.argv[2])]), receivers_of(config.monitoring.sinks, run))
"""


def test_a_process_killed_between_sending_and_recording_sends_the_same_alert_again(
    watched_run, write_scored, tmp_path
):
    """The command that is told notes the alert's id, then kills the process that told it."""
    sent, window = tmp_path / "sent", write_scored(seed=1, moved=1)
    note = f"cat >> {sent}; echo >> {sent}"
    killer = (
        f"monitoring.sinks.commands.ops.argv={json.dumps(['sh', '-c', f'{note}; kill -9 $PPID'])}"
    )
    killed = [sys.executable, "-c", KILLER, str(watched_run.path), str(window), QUICK, killer]
    assert subprocess.run(killed, timeout=60).returncode == -9
    told = f"monitoring.sinks.commands.ops.argv={json.dumps(['sh', '-c', note])}"
    config = load_config(watched_run.path, [QUICK, told])
    receivers = receivers_of(config.monitoring.sinks, watched_run)
    outcome = monitor(watched_run, config, read_window([window]), receivers)
    assert not outcome.is_new
    ids = [alert.id for alert in outcome.alerts]
    assert [record["id"] for record in read_jsonl(sent)] == [ids[0], *ids]
    assert [one["id"] for one in read_jsonl(watched_run.monitoring / "alerts.jsonl")] == ids


def test_secrets_of_the_environment_and_of_sinks_are_in_no_byte_written(
    watched_run, write_scored, monkeypatch
):
    canary = "c4n4ry-7f3e"
    for name in ("HOOK_URL", "HOOK_SECRET", "OTHER_TOKEN"):
        monkeypatch.setenv(name, f"https://nowhere.invalid/{canary}")
    hook = {
        "url_env": "HOOK_URL",
        "secret_env": "HOOK_SECRET",
        "allowed_hosts": ["nowhere.invalid"],
    }
    command = {"argv": ["sh", "-c", "env >&2; env; exit 1"]}
    changes = {"webhooks": {"ops": hook}, "commands": {"ops": command}}
    values = load_config(watched_run.path, [QUICK]).model_dump(mode="json")
    values["monitoring"]["sinks"] |= changes
    config = RunConfig.model_validate(values)
    receivers = receivers_of(config.monitoring.sinks, watched_run)
    outcome = monitor(watched_run, config, read_window([write_scored(seed=1, moved=1)]), receivers)
    assert {one.sink for one in outcome.deliveries if one.error} == {"webhook/ops", "command/ops"}
    for folder, _, names in os.walk(watched_run.path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                assert canary.encode() not in file.read(), name
