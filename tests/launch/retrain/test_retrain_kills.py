"""Ticks that are killed somewhere by chance: one retraining a trigger, a registry in order."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

DRILL = Path(__file__).with_name("kill_drill.py")


def drill(folder: Path, num_ticks: int, seed: int) -> dict:
    words = [sys.executable, str(DRILL), str(folder), str(num_ticks), str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def require_order(found: dict) -> None:
    assert found["faults"] == []
    assert found["retrainings"] == found["triggers"] == found["trained"]
    assert found["twice"] == []
    assert found["triggers"] >= 10
    assert sum(found["killed_at"].values()) >= 50
    assert found["states"].keys() <= {"promoted", "rejected", "rolled back"}


@pytest.fixture
def memory(tmp_path_factory):
    """A folder in memory where there is one: SQLite flushes it to the disk at every change."""
    memory = Path("/dev/shm")
    if memory.is_dir():
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("drill")


def test_ticks_killed_by_chance_retrain_once_a_trigger(memory):
    require_order(drill(memory, num_ticks=100, seed=1))


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_a_thousand_ticks_killed_at_every_point(memory):
    found = drill(memory, num_ticks=1000, seed=1)
    require_order(found)
    everywhere = {"begun", "promoted", "promote: aliases moved", "rollback: aliases moved"}
    everywhere |= {"register: files copied", "after train", "gated", "training", "rolled back"}
    assert everywhere <= found["killed_at"].keys()
