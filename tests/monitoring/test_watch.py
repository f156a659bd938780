"""A watched folder: each file judged once, whole, by one watch at a time, whatever dies."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from monitoring.history import History
from monitoring.watch import Watch
from pipeline.errors import BusyError, DataError, HistoryError, InputError, RunFolderError
from pipeline.records import RunFolder


class Watched:
    """A folder, and a watch of it that runs in a thread."""

    def __init__(self, path):
        self.run, self.folder = RunFolder(path / "run"), path / "incoming"
        self.folder.mkdir()
        self.judged, self.said, self.faults, self.stop = [], [], {}, threading.Event()

    def judge(self, path):
        self.judged.append((path.name, path.read_text()))
        if (error := self.faults.get(path.name)) is not None:
            raise error
        return "quiet"

    def watch(self, judge=None):
        judge, say = judge or self.judge, self.said.append
        return Watch(self.run, self.folder, 0.05, judge, lambda: None, say, settle_seconds=0.1)

    def put(self, name, text="rows", age=0):
        (self.folder / name).write_text(text)
        os.utime(self.folder / name, (1e9 - age, 1e9 - age))

    def run_until(self, condition, seconds=10.0):
        """Run the watch until something holds, then stop it."""
        self.stop.clear()
        thread = threading.Thread(target=self.watch().until, args=[self.stop])
        thread.start()
        give_up = time.monotonic() + seconds
        while not condition() and time.monotonic() < give_up:
            time.sleep(0.02)
        self.stop.set()
        thread.join(seconds)
        assert not thread.is_alive()


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path)


def test_files_are_judged_once_and_oldest_first(watched):
    watched.put("b.csv", age=5)
    watched.put("a.csv")
    watched.run_until(lambda: len(watched.judged) == 2)
    watched.put("c.csv", age=9)
    watched.run_until(lambda: len(watched.judged) == 3)
    assert [name for name, _ in watched.judged] == ["b.csv", "a.csv", "c.csv"]
    assert watched.said[0] == "b.csv: quiet"


def test_what_is_no_window_is_left_alone(watched):
    for name in (".hidden.csv", "notes.txt", "half.csv.part"):
        watched.put(name)
    (watched.folder / "folder.csv").mkdir()
    watched.put("rows.csv")
    watched.run_until(lambda: len(watched.judged) == 1)
    assert watched.judged == [("rows.csv", "rows")]


def test_a_file_still_being_written_is_left_until_it_is_whole(watched):
    def write():
        with open(watched.folder / "slow.csv", "w") as file:
            for _ in range(20):
                file.write("row\n")
                file.flush()
                time.sleep(0.03)

    writer = threading.Thread(target=write)
    writer.start()
    watched.run_until(lambda: bool(watched.judged))
    writer.join()
    assert watched.judged == [("slow.csv", "row\n" * 20)]


def test_a_bad_file_is_refused_once_and_judged_again_when_it_is_another(watched):
    watched.faults["bad.csv"] = DataError("there is no column 'confidence'")
    watched.put("bad.csv")
    watched.put("good.csv")
    watched.run_until(lambda: len(watched.judged) == 2)
    watched.run_until(lambda: False, seconds=0.3)
    assert len(watched.judged) == 2
    assert "bad.csv: refused: there is no column 'confidence'" in watched.said
    watched.put("bad.csv", "more rows")
    watched.run_until(lambda: len(watched.judged) == 3)
    assert watched.judged[-1] == ("bad.csv", "more rows")


@pytest.mark.parametrize("error", [HistoryError, OSError])
def test_what_may_pass_is_tried_again_at_the_next_round(watched, error):
    watched.faults["a.csv"] = error("the disk is full")
    watched.put("a.csv")
    watched.run_until(lambda: len(watched.judged) >= 2)
    watched.faults.clear()
    watched.run_until(lambda: "a.csv: quiet" in watched.said)
    assert "not yet: the disk is full" in watched.said


def test_a_run_that_cannot_judge_anything_ends_the_watch_and_marks_nothing(watched):
    watched.faults["a.csv"] = RunFolderError("there is no profile")
    watched.put("a.csv")
    with pytest.raises(RunFolderError):
        watched.watch().until(threading.Event())
    watched.faults.clear()
    watched.run_until(lambda: len(watched.judged) == 2)


def test_a_second_watch_of_the_same_run_is_refused(watched):
    second = []

    def judge(path):
        with pytest.raises(BusyError) as caught:
            watched.watch().until(threading.Event())
        second.append(str(caught.value))
        stop.set()
        return "quiet"

    stop = threading.Event()
    watched.put("a.csv")
    watched.watch(judge).until(stop)
    assert "watch of" in second[0]


def test_a_folder_that_is_not_there_is_named(watched):
    watched.folder.rmdir()
    with pytest.raises(InputError, match="There is no folder .*incoming to watch"):
        watched.watch().until(threading.Event())


# -- the command, as a process -------------------------------------------------------------------


@pytest.fixture
def start(watched_run):
    """Starts `masklock monitor --watch` on a folder; whatever still runs at the end is killed."""
    started = []

    def begin(folder):
        command = [sys.executable, "-m", "pipeline", "monitor", str(watched_run.path)]
        options = ["--watch", str(folder), "--every", "1s", "wandb.mode=disabled"]
        quick = "monitoring.drift.num_permutations=20"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*command, *options, quick], **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_watch_that_is_killed_goes_on_where_it_was_and_sigterm_ends_it(
    start, watched_run, write_scored
):
    folder = write_scored("one.parquet", seed=1, num_rows=80).parent
    killed = start(folder)
    assert killed.stdout.readline() == "one.parquet: Window 1: 80 rows, quiet\n"
    killed.kill()  # perhaps before the file was noted: then it is known by its content
    write_scored("two.parquet", seed=2, num_rows=80)
    second = start(folder)
    said = next(line for line in second.stdout if not line.startswith("one.parquet"))
    assert said == "two.parquet: Window 2: 80 rows, quiet\n"
    second.send_signal(signal.SIGTERM)
    rest, errors = second.communicate(timeout=20)
    assert (second.returncode, rest) == (0, "")
    assert "Traceback" not in errors
    with History(watched_run.monitoring / "history.sqlite") as history:
        assert [window.num_rows for window in history.windows()] == [80, 80]
