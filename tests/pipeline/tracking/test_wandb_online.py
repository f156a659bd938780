"""A run whose every stage tells a Weights & Biases server what it does: what arrives there."""

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from monitoring.dashboards.workspaces import specifications
from pipeline import metric_names
from pipeline.exhibits import MAX_POINTS, MAX_ROWS
from pipeline.metric_names import STEP, WINDOW, is_listed
from pipeline.records import read_jsonl

SOME_RULE = {"metric": "drift/num_rows", "above": 0, "severity": "critical", "runbook": "Look."}


@pytest.fixture(scope="module")
def whole(module_server, tmp_path_factory, masklock, make_config):
    """Trained, evaluated, and two windows judged."""
    folder = tmp_path_factory.mktemp("online")
    config = make_config(folder, monitoring={"rules": {"any_window": SOME_RULE}})
    run = folder / "runs" / "run"
    said = [masklock("train", config), masklock("evaluate", run)]
    for window in ("window", "test"):
        said.append(masklock("monitor", run, "--window", folder / f"{window}.jsonl", exit_code=3))
    training, windows = module_server.runs.values()
    return SimpleNamespace(
        server=module_server, run=run, said=said, folder=folder, training=training, windows=windows
    )


def logged_keys(*runs) -> set[str]:
    return {key for run in runs for row in run.history for key in row if not key.startswith("_")}


def shown_keys(run) -> set[str]:
    """Keys as they were logged: the table of a curve under the name of the curve."""
    charts = run.config["_wandb"]["value"].get("visualize", {})
    tables = {f"{name}_table" for name in charts}
    return {key for key in logged_keys(run) if key not in tables} | set(charts)


def table_in(run, key: str) -> dict[str, Any]:
    (row,) = [row for row in run.history if key in row][-1:]
    return json.loads(run.files[row[key]["path"]])


def test_nothing_was_asked_that_the_server_does_not_know(whole):
    assert whole.server.unknown == []


def test_every_row_of_the_training_arrives_once_at_its_step(whole):
    rows = read_jsonl(whole.run / "metrics.jsonl")
    expected = [{k: v for k, v in row.items() if k not in ("time", "step")} for row in rows]
    expected = [{STEP: row["step"], **numbers} for row, numbers in zip(rows, expected, strict=True)]
    arrived = [
        {key: value for key, value in row.items() if not key.startswith("_")}
        for row in whole.training.rows
    ]
    assert arrived == expected
    assert [row["_step"] for row in whole.training.history] == [*range(len(whole.training.history))]
    assert re.search(r"\(online\): 8 of 8 rows arrived at http", whole.said[0])
    assert (whole.training.exit_code, whole.windows.exit_code) == (0, 0)


def test_each_namespace_has_the_x_axis_of_its_stage(whole):
    patterns = {f"{namespace}/*" for namespace in metric_names.NAMESPACES}
    assert whole.training.axes == dict.fromkeys(patterns, STEP)
    assert whole.windows.axes == dict.fromkeys(patterns, WINDOW)
    assert [row[WINDOW] for row in whole.windows.rows] == [1, 2]
    assert all(STEP in row for row in whole.training.history)


def test_curves_are_bins_and_tables_are_short(whole):
    curve = table_in(whole.training, "uncertainty/predictive_entropy_histogram_table")
    shares = {"right": 0.0, "wrong": 0.0}
    for _, line, share in curve["data"]:
        shares[line] += share
    assert shares == {"right": pytest.approx(1), "wrong": pytest.approx(1)}
    assert len(curve["data"]) == 60

    for run in (whole.training, whole.windows):
        for name, data in run.files.items():
            if name.endswith(".table.json"):
                is_curve = "_table_" in name
                assert len(json.loads(data)["data"]) <= (MAX_POINTS if is_curve else MAX_ROWS)


def test_the_most_uncertain_rows_come_first(whole):
    table = table_in(whole.training, "uncertainty/most_uncertain")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    entropies = [row["predictive_entropy"] for row in rows]
    assert entropies == sorted(entropies, reverse=True)
    assert len(rows) == 64
    assert "of test" in rows[0]["text"]


def test_profile_and_report_are_kept_byte_for_byte(whole):
    kept = {artifact.kind: artifact for artifact in whole.server.artifacts}
    assert kept["report"].files["report.html"] == (whole.run / "report.html").read_bytes()
    for path in (whole.run / "profile").iterdir():
        assert kept["profile"].files[path.name] == path.read_bytes()
    assert all(artifact.committed for artifact in whole.server.artifacts)


def test_an_alert_arrives_once(whole):
    (alert,) = whole.server.alerts
    assert alert["runName"] == whole.windows.attributes["name"]
    assert alert["severity"] == "ERROR"
    assert alert["title"].startswith("any_window")
    assert "value 64" in alert["text"]
    assert "Look." in alert["text"]
    assert "{" not in alert["text"]


def test_both_runs_are_of_one_group(whole):
    attributes = [run.attributes for run in (whole.training, whole.windows)]
    assert [(one["groupName"], one["jobType"]) for one in attributes] == [
        ("run", "train"),
        ("run", "monitor"),
    ]
    assert attributes[1]["name"] == f"{attributes[0]['name']}-monitor"


def test_what_is_logged_is_listed_and_what_is_listed_is_logged(whole):
    training = (metric_names.TRAINING, metric_names.EVALUATION)
    shown = (metric_names.CURVES, metric_names.TABLES, metric_names.PICTURES)
    for run, lists in ((whole.training, training), (whole.windows, (metric_names.MONITORING,))):
        keys = shown_keys(run)
        assert [key for key in keys if not is_listed(key, *lists, *shown)] == []
        for pattern in {pattern for names in lists for pattern in names}:
            assert any(is_listed(key, {pattern: ""}) for key in keys), pattern
    both = shown_keys(whole.training) | shown_keys(whole.windows)
    for pattern in {pattern for names in shown for pattern in names}:
        assert any(is_listed(key, {pattern: ""}) for key in both), pattern


@pytest.mark.parametrize("name", ["dropout_and_uncertainty", "production_drift"])
def test_every_metric_of_a_panel_is_one_that_this_run_has_logged(whole, name):
    run = {"dropout_and_uncertainty": whole.training, "production_drift": whole.windows}[name]
    keys = logged_keys(run)
    for title, metrics, pattern in panels(specifications("run")[name]):
        assert set(metrics) <= keys, title
        if pattern is not None:
            assert any(re.fullmatch(pattern, key) for key in keys), title
        assert metrics or pattern, title


# How a chart and a table panel name the table they read.
_TABLE_KEY = re.compile(r'(?:"tableKey", "value": |"type": "string", "val": )"([^"]+)"')


def panels(specification: dict[str, Any]) -> Iterator[tuple[str, list[str], str | None]]:
    """Title, metrics (the x axis among them) and pattern of each panel."""
    for section in specification["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            config = panel["config"]
            tables = _TABLE_KEY.findall(json.dumps(config))
            metrics = [*config.get("metrics", []), *tables]
            axis = [config["xAxis"]] if "xAxis" in config else []
            title = f"{section['name']}: {config.get('chartTitle', metrics)}"
            yield title, metrics + axis * bool(metrics), config.get("metricRegex")


def test_the_key_is_in_no_byte_that_is_written(whole, api_key):
    assert whole.server.keys == {api_key}
    secret = api_key.encode()
    assert [data[:200] for data in whole.server.received if secret in data] == []
    files = [path for path in whole.folder.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert [path for path in files if secret in path.read_bytes()] == []
