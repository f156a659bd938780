"""JSON lines keep every row; Weights & Biases may fail in any way."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.schema import RunConfig, WandbConfig
from pipeline.records import RunFolder, read_jsonl
from pipeline.tracking import (
    JsonLinesTracker,
    Notice,
    NullTracker,
    Picture,
    TrackerGroup,
    WandbTracker,
    open_tracker,
    wandb_sink,
)
from pipeline.tracking.redaction import without_secrets
from pipeline.tracking.wandb_file import num_confirmed_lines, num_history_rows

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154"
    "789c63606060000000040001f61738550000000049454e44ae426082"
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return RunFolder(tmp_path / "run")


def run_config(mode: str = "offline") -> RunConfig:
    model = {"task": "text-classification", "model_name_or_path": "bert"}
    values = {"name": "run", "model": model, "data": {"path": "csv"}, "wandb": {"mode": mode}}
    return RunConfig.model_validate(values)


def log_rows(tracker, num_rows: int) -> None:
    for step in range(num_rows):
        tracker.log({"train/loss": 1.0 / (step + 1)}, step)


def child_processes(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def fake_wandb(tmp_path, monkeypatch, source: str) -> None:
    """Put a module `wandb` first on the path of the process that imports it."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))


FAKE_RUN = """
import os, sys, time
class Run:
    dir, url, offline, summary = "x/files", "", True, {}
    def define_metric(self, *_, **__): pass
    def log(self, row, **_): LOG
    def finish(self, exit_code=0): FINISH
def Settings(**_): pass
def init(**_): return Run()
"""


class HangingClient:
    """Answers `num_answers` requests and hangs in the next one, deaf to everything."""

    def __init__(self, num_answers: int) -> None:
        self.num_answers = num_answers

    def request(self, message, timeout_seconds):
        self.num_answers -= 1
        if self.num_answers < 0:
            time.sleep(3600)
        return {}

    def kill(self):
        time.sleep(3600)


def test_json_lines_keep_rows_and_forget_those_after_a_rewind(folder):
    tracker = JsonLinesTracker(folder.metrics)
    tracker.rewind(3)
    log_rows(tracker, 6)
    tracker.rewind(3)
    tracker.log({"train/loss": float("nan")}, 4)

    rows = read_jsonl(folder.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[1]["train/loss"] == 0.5
    assert rows[4]["train/loss"] is None
    assert tracker.finish() == "metrics.jsonl: 7 rows written."


def test_only_the_main_process_tracks(folder):
    tracker = open_tracker(run_config(), folder, is_main=False)

    assert isinstance(tracker, NullTracker)
    assert tracker.finish() == ""


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        ("offline", None, "offline"),
        ("disabled", None, None),
        ("online", "disabled", None),
        ("disabled", "online", "online"),
        ("online", "dryrun", "offline"),
    ],
)
def test_the_mode_of_the_environment_wins(folder, monkeypatch, configured, environment, expected):
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    group = open_tracker(run_config(configured), folder, is_main=True)

    modes = [tracker._mode for tracker in group.trackers if isinstance(tracker, WandbTracker)]
    assert modes == ([expected] if expected else [])


def test_an_offline_run_holds_every_row_and_goes_on_under_its_id(folder, caplog):
    png = folder.path / "curve.png"
    png.parent.mkdir()
    png.write_bytes(PNG)
    for first_step in (0, 5):
        tracker = open_tracker(run_config(), folder, is_main=True)
        tracker.start({"seed": 42, "hub_token": "hf_abc"}, "run")
        for step in range(first_step, first_step + 5):
            tracker.log({"train/loss": 0.5}, step)
        tracker.show("curves", Picture(png))
        tracker.summary({"test/accuracy": 0.75})
        sentence = tracker.finish()
        assert "5 of 5 rows arrived; send them with `wandb sync" in sentence
        time.sleep(1.1 if first_step == 0 else 0)  # wandb names folders by the second

    first, second = sorted(folder.wandb.glob("offline-run-*/*.wandb"))
    assert first.name == second.name
    assert num_history_rows(first) == num_history_rows(second) == 5
    assert list(folder.wandb.glob("offline-run-*/files/media/images/curves*.png"))
    content = first.read_bytes()
    assert all(text in content for text in (b"train/global_step", b"curves", b"test/accuracy"))
    assert b"hf_abc" not in content
    assert not caplog.records


def test_the_service_of_wandb_may_be_killed(folder, caplog):
    tracker = WandbTracker(WandbConfig(), folder)
    tracker.start({}, "run")
    log_rows(tracker, 3)
    wait_for(lambda: tracker._num_history_taken == 3)
    (service,) = child_processes(tracker._client._process.pid)
    os.kill(service, signal.SIGKILL)
    log_rows(tracker, 4)

    assert " of 7 rows arrived" in tracker.finish()
    assert "dropped" in tracker.finish()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('no wandb here')", "ImportError: no wandb here"),
        ("def Settings(**_): raise SystemExit(3)", "SystemExit: 3"),
        (FAKE_RUN.replace("LOG", "raise OSError(28, 'No space left')"), "No space left"),
        (FAKE_RUN.replace("LOG", "os._exit(1)"), "its process died"),
        (FAKE_RUN.replace("LOG", "os.kill(os.getpid(), 11)"), "its process died"),
        (FAKE_RUN.replace("LOG", "time.sleep(3600)"), "no answer within 0.3 s"),
        (FAKE_RUN.replace("LOG", "0").replace("FINISH", "time.sleep(3600)"), "no answer within"),
        (FAKE_RUN.replace("LOG", "0").replace("FINISH", "1 / 0"), "ZeroDivisionError"),
    ],
)
def test_any_failure_of_wandb_is_one_warning(folder, tmp_path, monkeypatch, caplog, source, reason):
    fake_wandb(tmp_path, monkeypatch, source.replace("FINISH", "0"))
    timeout = 0.3 if "sleep" in source else 10
    wandb = WandbTracker(WandbConfig(), folder, timeout_seconds=timeout)
    group = TrackerGroup([JsonLinesTracker(folder.metrics), wandb])
    group.start({}, "run")
    log_rows(group, 4)
    sentence = group.finish()

    assert reason in sentence
    assert len(caplog.records) == 1
    assert len(read_jsonl(folder.metrics)) == 4


def test_a_refused_request_costs_none_of_the_rows_before_it(folder, caplog):
    tracker = WandbTracker(WandbConfig(), folder)
    tracker.start({}, "run")
    log_rows(tracker, 3)
    tracker.artifact("report", folder.path / "nowhere.html")
    wait_for(lambda: tracker._ended.is_set())
    log_rows(tracker, 1)

    sentence = tracker.finish()
    assert "3 of 4 rows arrived" in sentence
    assert "dropped: ValueError: Path is not a file" in sentence
    assert len(caplog.records) == 1


@pytest.mark.parametrize("num_answers", [0, 1, 3])
def test_a_client_that_hangs_costs_the_training_nothing(folder, caplog, num_answers):
    client = HangingClient(num_answers)
    tracker = WandbTracker(WandbConfig(), folder, client=client, timeout_seconds=0.2)
    started = time.monotonic()
    tracker.start({}, "run")
    log_rows(tracker, 1000)
    assert time.monotonic() - started < 5

    sentence = tracker.finish()
    assert time.monotonic() - started < 10
    assert f"{max(num_answers - 1, 0)} of 1000 rows arrived; dropped: no answer" in sentence
    assert len(caplog.records) == 1


def test_an_alert_that_is_not_taken_is_an_error_with_the_reason(folder):
    tracker = WandbTracker(WandbConfig(), folder, client=HangingClient(2), timeout_seconds=0.2)
    tracker.start({}, "run")
    send = wandb_sink(tracker)
    alert = {"id": "a1", "run": "run", "title": "drift", "severity": "info", "evidence": {}}
    send(alert)
    with pytest.raises(ConnectionError, match="dropped: no answer within 0.2 s"):
        send(alert)


def test_a_sink_says_the_evidence_and_what_to_do(folder):
    told = []
    tracker = SimpleNamespace(alert=told.append)
    evidence = {"value": 0.123456, "drifted": {"confidence": {"test": "ks", "effect": 0.75}}}
    wandb_sink(tracker)(
        {"id": "a1", "run": "intents", "title": "Confidence fell", "severity": "critical",
         "evidence": evidence, "runbook": "Read the rows."}
    )  # fmt: skip
    assert told == [
        Notice(
            "Confidence fell",
            "value 0.1235, drifted (confidence (test ks, effect 0.75))\nRead the rows.\n"
            "Alert a1 of intents.",
            "critical",
        )
    ]


def test_lines_count_as_arrived_once_the_server_has_confirmed_them(tmp_path):
    sent, confirmed = "filestream: sending request", "filestream: request sent"
    messages = [
        {"msg": sent, "events_lines": 1}, {"msg": confirmed, "status": "200 OK"},
        {"msg": sent, "history_lines": 3}, {"msg": confirmed, "status": "200 OK"},
        {"msg": sent, "history_lines": 2}, {"msg": confirmed, "status": "500"},
        {"msg": sent, "history_lines": 2}, {"msg": "api: retrying error"},
    ]  # fmt: skip
    log = tmp_path / "debug-internal.log"
    log.write_text("\n".join(map(json.dumps, messages)))
    assert num_confirmed_lines(log) == 3


def test_a_full_queue_drops_the_tracker(folder, caplog):
    tracker = WandbTracker(WandbConfig(), folder, client=HangingClient(1), queue_size=10)
    tracker.start({}, "run")
    log_rows(tracker, 50)

    assert "0 of 50 rows arrived; dropped: 10 requests are waiting." in tracker.finish()
    assert len(caplog.records) == 1


def test_a_call_that_hangs_is_noticed_by_the_next_row(folder, caplog):
    tracker = WandbTracker(WandbConfig(), folder, client=HangingClient(0), timeout_seconds=0.1)
    tracker.start({}, "run")
    wait_for(lambda: tracker._busy_since is not None)
    time.sleep(0.15)
    log_rows(tracker, 1)

    assert "no answer within" in caplog.text
    assert "dropped" in tracker.finish()


def test_a_run_folder_that_cannot_be_written_drops_the_tracker(folder, caplog):
    folder.path.write_text("a file, not a folder")
    tracker = WandbTracker(WandbConfig(), folder)
    tracker.start({}, "run")

    assert "0 of 0 rows arrived; dropped:" in tracker.finish()
    assert len(caplog.records) == 1


def test_secrets_are_hidden_and_nothing_else():
    config = {
        "hub_token": "hf_abc",
        "data": {"path": "https://me:pw@host/x.csv?token=abc&rows=3", "text_column_name": "text"},
        "nested": [{"api_key": "abc"}],
        "webhooks": {"chat": {"url": "https://hooks.example/services/T0/B0/xyz"}},
        "max_new_tokens": 3,
        "tokenizer": "bert",
    }
    assert without_secrets(config) == {
        "hub_token": "***",
        "data": {"path": "https://***@host/x.csv?token=***&rows=3", "text_column_name": "text"},
        "nested": [{"api_key": "***"}],
        "webhooks": {"chat": {"url": "https://hooks.example/***"}},
        "max_new_tokens": 3,
        "tokenizer": "bert",
    }


def test_importing_the_trackers_imports_neither_wandb_nor_torch():
    program = (
        "import pipeline.tracking, sys; sys.exit('wandb' in sys.modules or 'torch' in sys.modules)"
    )
    repository = Path(__file__).parents[2]

    assert subprocess.run([sys.executable, "-c", program], cwd=repository).returncode == 0
