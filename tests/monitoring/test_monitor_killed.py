"""A monitoring killed at random moments, again and again, ends where one that is not does."""

import random
import shutil
import subprocess
import sys
import time

import pytest

from monitoring.history import History
from monitoring.monitor import monitor
from monitoring.receivers import receivers_of
from monitoring.scored import read_window
from pipeline.config.load import load_config
from pipeline.records import RunFolder, read_jsonl

pytestmark = pytest.mark.drill

QUICK = "monitoring.drift.num_permutations=20"
NUM_KILLS = 25
WORKER = f"""
import sys
from pathlib import Path
from monitoring.monitor import monitor
from monitoring.receivers import receivers_of
from monitoring.scored import read_window
from pipeline.config.load import load_config
from pipeline.records import RunFolder
run = RunFolder(sys.argv[1])
config = load_config(run.path, ["{QUICK}"])
receivers = receivers_of(config.monitoring.sinks, run)
print("ready", flush=True)
for path in sys.argv[2:]:
    monitor(run, config, read_window([Path(path)]), receivers)
print("done", flush=True)
"""


@pytest.fixture
def windows(write_scored):
    """Twelve windows, every third one with strange rows."""
    return [
        write_scored(f"{n}.parquet", seed=n, moved=float(n % 3 == 0), num_rows=150)
        for n in range(1, 13)
    ]


def judge_all(run, windows):
    config = load_config(run.path, [QUICK])
    receivers = receivers_of(config.monitoring.sinks, run)
    for path in windows:
        monitor(run, config, read_window([path]), receivers)


def learned(run):
    """All that judging the windows leaves, but for times."""
    with History(run.monitoring / "history.sqlite") as history:
        names = ("uncertainty", "out_of_distribution", "doubt", "error")
        return (
            [(one.id, one.sha256, one.outcome, one.measures) for one in history.windows()],
            [(one.id, one.repeats, one.evidence, one.rows) for one in history.alerts()],
            {name: history.detector_state(name) for name in names},
            [(one.alert, one.sink, one.state) for one in history.deliveries()],
        )


def test_kills_at_random_moments_change_nothing(watched_run, windows, tmp_path):
    calm = RunFolder(tmp_path / "calm" / watched_run.path.name)
    shutil.copytree(watched_run.path, calm.path)
    judge_all(calm, windows)
    draw, command = random.Random(5), [sys.executable, "-c", WORKER, str(watched_run.path)]
    num_interrupted = 0
    for _ in range(NUM_KILLS):
        with subprocess.Popen([*command, *map(str, windows)], stdout=subprocess.PIPE) as worker:
            worker.stdout.readline()
            time.sleep(draw.uniform(0, 0.6))
            worker.kill()
            num_interrupted += b"done" not in worker.stdout.read()
    judge_all(watched_run, windows)
    assert num_interrupted > 3
    assert learned(watched_run) == learned(calm)
    sent = [record["id"] for record in read_jsonl(watched_run.monitoring / "alerts.jsonl")]
    with History(watched_run.monitoring / "history.sqlite") as history:
        assert sent == history.alert_ids()
    files = {path.stem for path in (watched_run.monitoring / "alerts").glob("*.json")}
    assert files == set(sent)
