"""Stages as processes: the lock they hold, the signals they hear, the time they have."""

import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from launch.retrain import processes
from launch.retrain.processes import TIMED_OUT, Processes
from pipeline.errors import BusyError
from pipeline.locking import file_lock

POLITE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.fixture
def stage(monkeypatch):
    """`python -m pipeline WORD` becomes `python -c WORD`."""

    real = subprocess.Popen

    def popen(words, **options):
        return real([words[0], "-c", *words[3:]], **options)

    monkeypatch.setattr(processes.subprocess, "Popen", popen)


def patience(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def test_output_goes_to_the_log_and_the_exit_code_comes_back(stage, tmp_path):
    log = tmp_path / "log.txt"
    with file_lock(tmp_path / "lock", 0, "it") as lock:
        code = Processes(lock, patience(60))(["import sys; print('said'); sys.exit(3)"], log)
    assert code == 3
    assert "said" in log.read_text()


def test_a_stage_that_takes_too_long_is_stopped_politely_then_killed(stage, tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    with file_lock(tmp_path / "lock", 0, "it") as lock:
        run = Processes(lock, patience(1.0), grace=patience(0.2))
        assert run([deaf], tmp_path / "log") == TIMED_OUT


def test_a_signal_to_the_tick_lets_the_stage_save(stage, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with file_lock(tmp_path / "lock", 0, "it") as lock:
        assert Processes(lock, patience(30))([POLITE], tmp_path / "log") == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_training_of_a_killed_tick_keeps_others_away_until_it_ends(tmp_path):
    """The kernel gives the lock back with its last holder."""
    script = (
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "from pipeline.locking import file_lock\n"
        "with file_lock(Path(sys.argv[1]), 0, 'it') as lock:\n"
        "    words = [sys.executable, '-c', 'import sys; sys.stdin.read()']\n"
        "    subprocess.Popen(words, pass_fds=(lock,))\n"
        "    os._exit(137)\n"
    )
    lock = tmp_path / "lock"
    tick = subprocess.Popen(
        [sys.executable, "-c", script, str(lock)],
        stdin=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert tick.wait(30) == 137
    with pytest.raises(BusyError), file_lock(lock, 0, "it"):
        pass
    tick.stdin.close()  # the orphan reads to its end
    with file_lock(lock, 10, "it"):
        pass
