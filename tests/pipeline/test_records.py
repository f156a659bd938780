"""Files of a run folder survive kills in the middle of a write, and torn lines."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import records
from pipeline.errors import RunFolderError

REPOSITORY = Path(records.__file__).parents[1]


def start(program: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


REWRITE_FOREVER = """
import sys
from pipeline.records import write_text
write_text(sys.argv[1], "0" * 3_000_000)
print("ready", flush=True)
for number in range(10**9):
    write_text(sys.argv[1], str(number % 10) * 3_000_000)
"""

DIE_BEFORE_THE_RENAME = """
import os, signal, sys
from pipeline import records
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
records.write_text(sys.argv[1], "new")
"""

APPEND_FOREVER = """
import sys
from pipeline.records import append_jsonl
for number in range(10**9):
    append_jsonl(sys.argv[1], {"step": number, "text": "é" * 20_000})
    if number == 0:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("wait_seconds", [0.003, 0.011, 0.017])
def test_a_file_killed_in_the_middle_of_a_write_is_whole(tmp_path, wait_seconds):
    path = tmp_path / "report.json"
    process = start(REWRITE_FOREVER, path)
    process.stdout.readline()
    time.sleep(wait_seconds)
    kill(process)

    text = path.read_text()
    assert text == text[0] * 3_000_000


def test_a_kill_just_before_the_rename_leaves_the_old_content(tmp_path):
    path = tmp_path / "report.json"
    records.write_text(path, "old")
    process = start(DIE_BEFORE_THE_RENAME, path)
    process.communicate()

    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


@pytest.mark.parametrize("wait_seconds", [0.002, 0.007])
def test_lines_killed_in_the_middle_of_an_append_are_whole_and_go_on(tmp_path, wait_seconds):
    path = tmp_path / "metrics.jsonl"
    process = start(APPEND_FOREVER, path)
    process.stdout.readline()
    time.sleep(wait_seconds)
    kill(process)

    before = records.read_jsonl(path)
    records.append_jsonl(path, {"step": len(before)})
    steps = [row["step"] for row in records.read_jsonl(path)]
    assert steps == list(range(len(before) + 1))


def test_a_line_cut_at_any_byte_is_passed_over_and_mended_by_the_next_append(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n'
    last = '{"step": 2, "é": "}"}'.encode()
    for length in range(len(last) + 1):
        path.write_bytes(whole + last[:length])
        expected = [1, 2] if length == len(last) else [1]
        assert [row["step"] for row in records.read_jsonl(path)] == expected

        records.append_jsonl(path, {"step": 3})
        assert [row["step"] for row in records.read_jsonl(path)] == [*expected, 3]


def test_zeros_left_by_a_power_cut_at_the_end_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\0" * 512)

    assert records.read_jsonl(path) == [{"step": 1}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step"\n{"step": 3}\n')

    with pytest.raises(RunFolderError, match="line 2: expected one JSON object"):
        records.read_jsonl(path)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    records.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))

    with pytest.raises(OSError, match="disk full"):
        records.write_text(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert path.read_text() == "old"


def test_an_append_that_the_disk_cut_short_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    records.append_jsonl(path, {"step": 1})
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:5]))

    with pytest.raises(OSError, match="only 5 of"):
        records.append_jsonl(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n'


def test_numbers_of_numpy_are_written_and_non_finite_ones_become_null(tmp_path):
    path = tmp_path / "deep" / "report.json"
    values = [np.float32(0.5), np.int64(7), np.array([1.0, np.nan]), float("inf"), (True, None)]
    records.write_json(path, {"values": values, "path": Path("a/b")})

    expected = [0.5, 7, [1.0, None], None, [True, None]]
    assert json.loads(path.read_text()) == {"values": expected, "path": "a/b"}


def test_sha256_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    records.write_bytes(path, b"weights")

    assert records.sha256_of_file(path) == hashlib.sha256(b"weights").hexdigest()


def test_a_run_folder_names_its_places():
    folder = records.RunFolder("runs/quickstart")

    assert folder.checkpoint(30) == Path("runs/quickstart/checkpoint-30")
    assert folder.report_json == Path("runs/quickstart/evaluation/report.json")
