"""What was written offline arrives whole by `wandb sync`; views are saved over themselves."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from monitoring.dashboards.workspaces import TITLES, specifications
from pipeline.config.schema import WandbConfig
from pipeline.exhibits import Curve, Notice, Table
from pipeline.records import RunFolder, write_text
from pipeline.tracking import WandbTracker


def track(folder: RunFolder, first_step: int) -> str:
    """Three rows of one session, offline."""
    tracker = WandbTracker(WandbConfig(), folder, mode="offline")
    tracker.start({}, "run")
    for step in range(first_step, first_step + 3):
        tracker.log({"train/loss": 1 / (step + 1)}, step)
    if first_step:
        tracker.show("ood/best_score_histogram", Curve("msp", "msp", {"test": [(0.0, 0.5)]}))
        tracker.show("uncertainty/most_uncertain", Table(["text"], [["the cow"]]))
        tracker.artifact("report", folder.report_html)
        tracker.alert(Notice("A very long title " * 10, "what to do", "warning"))
    return tracker.finish()


def test_two_offline_sessions_become_one_run(server, tmp_path):
    folder = RunFolder(tmp_path / "run")
    write_text(folder.report_html, "a page")
    said = [track(folder, 0)]
    time.sleep(1.1)  # wandb names folders by the second
    said.append(track(folder, 3))
    write_text(folder.report_html, "a later page")  # what was kept is what was there then
    assert all("3 of 3 rows arrived; send them with `wandb sync" in sentence for sentence in said)
    command = [Path(sys.executable).with_name("wandb"), "sync", folder.wandb]
    subprocess.run(command, cwd=tmp_path, env=os.environ, check=True, capture_output=True)

    (run,) = server.runs.values()
    assert [row["train/global_step"] for row in run.rows] == [0, 1, 2, 3, 4, 5]
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3, 4, 5, 6, 7]
    (report,) = [artifact for artifact in server.artifacts if artifact.kind == "report"]
    assert report.files["report.html"] == b"a page"
    (alert,) = server.alerts
    assert (alert["severity"], len(alert["title"])) == ("WARN", 63)
    assert server.unknown == []


def test_views_are_saved_and_saved_again_in_their_place(server, tmp_path, make_config, masklock):
    config = make_config(tmp_path)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    for _ in range(2):
        said = masklock("dashboard", config, "--save")

    views = list(server.views.values())
    assert [view["displayName"] for view in views] == list(TITLES.values())
    assert [view["spec"] for view in views] == list(specifications("run").values())
    assert all(
        view["entityName"] == "tester" and view["projectName"] == "masklock" for view in views
    )
    assert [f"{server.url}/tester/masklock?nw=" in line for line in said.splitlines()] == [True] * 2
    assert server.unknown == []


def test_a_view_that_cannot_be_saved_is_one_clear_error(
    server, tmp_path, make_config, masklock, monkeypatch
):
    config = make_config(tmp_path)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    monkeypatch.setenv("WANDB_API_KEY", "")
    with pytest.raises(AssertionError, match="It needs the network, a key"):
        masklock("dashboard", config, "--save")


def test_dashboards_without_their_extra_say_what_to_install(
    tmp_path, make_config, masklock, monkeypatch
):
    config = make_config(tmp_path)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "monitoring.dashboards.workspaces", raising=False)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(AssertionError, match=r"Install it: pip install 'masklock\[dashboards\]'"):
        masklock("dashboard", config)
