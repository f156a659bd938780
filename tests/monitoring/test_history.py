"""The history of windows: whole or not at all, whatever happens to process, disk and file."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest

from monitoring.alerts import Alert, alert_id
from monitoring.history import Delivery, History, WindowRecord
from pipeline.errors import DataError, HistoryError

START = datetime(2026, 5, 4, tzinfo=UTC)
# Adds windows for ever; each says its number three times: in itself, a detector and an alert.
WRITER = """
import sys
from monitoring.alerts import Alert
from monitoring.history import Delivery, History, WindowRecord
limit = int(sys.argv[2])
if limit:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
with History(sys.argv[1]) as history:
    while True:
        n = len(history.windows()) + 1
        record = WindowRecord(f"{n:064}", "2026-05-04T00:00:00+00:00", n, "alert")
        alert = Alert(f"{n:016}", "run", "v1", record.created, "info", "rule", "title" * 100)
        delivery = Delivery(alert.id, "sink", "pending")
        history.add_window(record, {"one": {"n": n}, "two": {"n": n}}, [alert], [delivery])
        print(n, flush=True)
"""


def record(number, **changed):
    values = {"sha256": f"{number:064}", "created": START.isoformat(), "num_rows": 10}
    return WindowRecord(**{"outcome": "quiet", **values, **changed})


def alert(number=1, created=START, **changed):
    id = alert_id("run", str(number), "rule")
    values = {"model_version": "v1", "created": created.isoformat(), "severity": "warning"}
    return Alert(id, "run", rule="rule", title="title", **values, **changed)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "monitoring" / "history.sqlite"


@pytest.fixture
def history(path):
    with History(path) as opened:
        yield opened


def require_whole(path):
    """Each window is there with its detectors, its alert and its delivery, or not at all."""
    with History(path) as history:
        num_windows = len(history.windows())
        assert [window.num_rows for window in history.windows()] == list(range(1, num_windows + 1))
        assert len(history.alerts()) == len(history.deliveries("pending")) == num_windows
        for name in ("one", "two"):
            assert history.detector_state(name) == ({"n": num_windows} if num_windows else None)
    return num_windows


def start_writer(path, limit=0):
    command = [sys.executable, "-c", WRITER, str(path), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_is_recorded_is_read_back(history):
    id = history.add_window(
        record(1, measures={"a": 1.5}, details={"x": [1, None]}),
        {"uncertainty": {"log": [0.25]}},
        [alert()],
        [Delivery(alert().id, "ops", "pending")],
    )
    assert history.windows() == [record(1, measures={"a": 1.5}, details={"x": [1, None]}, id=id)]
    assert history.detector_state("uncertainty") == {"log": [0.25]}
    assert history.alerts() == [alert()]
    assert history.deliveries() == [Delivery(alert().id, "ops", "pending")]


def test_the_same_window_is_recorded_once(history):
    history.add_window(record(1))
    with pytest.raises(HistoryError, match="holds this already"):
        history.add_window(record(1), {"uncertainty": {"n": 2}}, [alert()])
    assert len(history.windows()) == 1
    assert history.alerts() == []
    assert history.detector_state("uncertainty") is None
    history.add_window(record(1, labelled=True))
    assert history.window(f"{1:064}", True).id == 2


def test_windows_are_in_the_order_of_judging_whatever_the_clock_says(history):
    for number, hours in enumerate([5, 3, 9, 1]):
        history.add_window(record(number, created=(START + timedelta(hours=hours)).isoformat()))
    assert [window.sha256[-1] for window in history.windows()] == list("0123")
    assert [window.sha256[-1] for window in history.windows(2)] == list("23")


def test_alerts_are_found_by_state_and_time(history):
    late = alert(2, START + timedelta(hours=1))
    history.add_window(record(1), {}, [alert(1), late])
    history.acknowledge(alert(1).id[:6], "ann", "known", START)
    assert [one.id for one in history.alerts("open")] == [late.id]
    assert history.alerts("acknowledged")[0].acknowledged["by"] == "ann"
    assert [one.id for one in history.alerts(since=START + timedelta(minutes=1))] == [late.id]


def test_the_first_acknowledgement_stands_and_an_unknown_alert_is_refused(history):
    history.add_window(record(1), {}, [alert(1)])
    history.acknowledge(alert(1).id, "ann", "", START)
    assert history.acknowledge(alert(1).id, "bob", "", START)[0].acknowledged["by"] == "ann"
    with pytest.raises(DataError, match="begins with 'zzz', but 0 do"):
        history.acknowledge("zzz", "ann", "", START)


def test_an_acknowledgement_is_one_of_the_repeats_too(history):
    history.add_window(record(1), {}, [alert(1), alert(2, repeats=alert(1).id), alert(3)])
    marked = history.acknowledge(alert(1).id, "ann", "", START)
    assert [one.id for one in marked] == [alert(1).id, alert(2).id]
    assert [one.id for one in history.alerts("open")] == [alert(3).id]
    assert history.num_repeats() == {alert(1).id: 1}


def test_a_process_killed_at_any_moment_leaves_whole_windows(path):
    num_before = 0
    for delay in (0.0, 0.004, 0.011, 0.017):
        with start_writer(path) as writer:
            writer.stdout.readline()
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        num_windows = require_whole(path)
        assert num_windows > num_before
        num_before = num_windows


def test_a_full_disk_leaves_whole_windows_and_says_so(path):
    with start_writer(path, limit=200_000) as writer:
        said, error = writer.communicate(timeout=60)
    assert writer.returncode == 1
    assert "HistoryError" in error
    assert "run again once the disk has room" in error
    assert require_whole(path) >= len(said.split()) > 3


def test_two_processes_write_at_once_and_nothing_is_lost(path):
    with History(path), start_writer(path) as writer:
        writer.stdout.readline()
        with History(path) as other:
            other.save_delivery(Delivery(f"{1:016}", "second", "held"))
        writer.kill()
    with History(path) as history:
        assert len(history.deliveries("held")) == 1


@pytest.mark.parametrize("size", [100, 5000, 20_000])
def test_a_file_cut_short_is_named(path, size):
    with History(path) as history:
        for number in range(60):
            history.add_window(record(number, details={"text": "x" * 500}))
    os.truncate(path, size)
    with pytest.raises(HistoryError, match="damaged.*move it aside"), History(path):
        pass


def test_a_history_of_a_later_version_is_refused(path):
    with History(path):
        pass
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(HistoryError, match="of version 2, this Masklock reads version 1"):
        History(path).__enter__()
