"""A file of alerts, and a command that is given them."""

import json
import sys
import time

import pytest

from monitoring.sinks import DeliveryError
from monitoring.sinks.command import Command
from monitoring.sinks.json_lines import JsonLines
from pipeline.records import read_jsonl

ALERT = {"id": "0123456789abcdef", "title": "a <b> & c; $(touch evil)"}


def python(code):
    return [sys.executable, "-c", code]


def test_an_alert_is_one_line_however_often_it_is_sent(tmp_path):
    sink = JsonLines(tmp_path / "alerts.jsonl")
    for alert in (ALERT, ALERT, {"id": "other"}, ALERT):
        sink(alert)
    assert read_jsonl(sink.path) == [ALERT, {"id": "other"}]


def test_a_line_torn_by_a_crash_is_written_again(tmp_path):
    sink = JsonLines(tmp_path / "alerts.jsonl")
    sink({"id": "first"})
    whole = sink.path.read_bytes()
    sink(ALERT)
    sink.path.write_bytes(sink.path.read_bytes()[:-9])
    sink(ALERT)
    assert sink.path.read_bytes().startswith(whole)
    assert read_jsonl(sink.path) == [{"id": "first"}, ALERT]


def test_a_command_is_given_the_alert_as_json_and_no_shell_reads_it(tmp_path):
    code = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    out = tmp_path / "a file; $(touch evil)"
    Command([*python(code), str(out)], 20)(ALERT)
    assert json.loads(out.read_text()) == ALERT
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_command_that_fails_or_is_not_there_says_so():
    with pytest.raises(DeliveryError, match="ended with exit code 3"):
        Command(python("raise SystemExit(3)"), 20)(ALERT)
    with pytest.raises(DeliveryError, match="/no/such could not be started: No such file"):
        Command(["/no/such"], 20)(ALERT)


def test_a_command_that_reads_nothing_has_still_been_told():
    Command(["true"], 20)({**ALERT, "rows": list(range(100_000))})


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path):
    started, alive = time.monotonic(), tmp_path / "alive"
    child = f"import time; time.sleep(1.5); open({str(alive)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(DeliveryError, match="did not end in 0.5 s"):
        Command(python(code), 0.5)(ALERT)
    assert time.monotonic() - started < 1.4
    time.sleep(1.5)
    assert not alive.exists()
