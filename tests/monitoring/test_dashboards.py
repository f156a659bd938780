"""Workspaces are what the reviewed files say; exhibits are binned, short, and named for people."""

import json

import numpy as np
import pyarrow as pa
import pytest

from monitoring.alerts import Alert
from monitoring.dashboards.evaluation import (
    doubtful,
    histogram,
    reliability,
    separation,
    uncertainty,
)
from monitoring.dashboards.window import alert_table, window_curves, window_row
from monitoring.dashboards.workspaces import REVIEWED, specifications, view_name
from monitoring.profile import profile_of
from monitoring.run import Run, load_run
from monitoring.scored import Window
from pipeline.exhibits import MAX_ROWS, Curve, Table


def test_the_reviewed_files_are_what_the_code_builds():
    for name, specification in specifications().items():
        assert json.loads(REVIEWED[name].read_text()) == specification, (
            f"{name}: call write_reviewed()"
        )


def test_the_workspace_of_a_run_shows_its_two_wandb_runs():
    (section,) = {json.dumps(s["section"]["runSets"]) for s in specifications("mine").values()}
    (run_set,) = json.loads(section)
    (condition,) = run_set["filters"]["filters"]
    assert condition["key"] == {"section": "run", "name": "group"}
    assert (condition["op"], condition["value"]) == ("=", "mine")


def test_a_view_has_one_name_for_each_run():
    names = {view_name(name, run) for name in REVIEWED for run in ("a", "b")}
    assert len(names) == 4
    assert view_name("production_drift", "a") in names
    assert all(name.startswith("nw-") and len(name) == 16 for name in names)


def test_reliability_has_a_line_for_each_way_and_only_bins_with_rows(whole_run):
    run = load_run(whole_run)
    curve = reliability(run)["calibration/reliability"]
    bins = run.section("calibration")["mc"]["reliability"]
    expected = [(row["confidence"], row["accuracy"]) for row in bins if row["count"]]
    assert curve.lines["Monte-Carlo"] == expected
    assert set(curve.lines) == {
        "Deterministic", "Monte-Carlo", "Monte-Carlo + temperature", "Perfect"
    }  # fmt: skip


def test_one_score_separates_all_sets_in_one_chart(whole_run):
    curve = separation(load_run(whole_run))["ood/best_score_histogram"]
    assert curve.x == "mahalanobis"
    assert set(curve.lines) == {"test", "http-and-xml", "prose"}
    assert all(sum(y for _, y in line) == pytest.approx(1) for line in curve.lines.values())


def test_histograms_agree_with_numpy():
    random = np.random.default_rng(3)
    groups = {"a": random.normal(0, 1, 500), "b": random.normal(1, 1, 300)}
    curve = histogram("t", "x", groups)
    edges = np.linspace(min(map(min, groups.values())), max(map(max, groups.values())), 31)
    expected = np.histogram(groups["b"], edges)[0] / 300
    assert [y for _, y in curve.lines["b"]] == pytest.approx(expected)


def test_only_the_most_uncertain_rows_go_into_the_table():
    samples = [
        {"split": "test", "sample_id": n, "text": "x" * 600, "predictive_entropy": n / 2000}
        for n in range(MAX_ROWS + 500)
    ] + [{"split": "ood:far", "sample_id": 9, "text": "far", "predictive_entropy": 9.0}]
    table = doubtful(Run("run", samples=samples))["uncertainty/most_uncertain"]
    assert len(table.rows) == MAX_ROWS
    assert table.rows[0][0] == MAX_ROWS + 499
    assert len(table.rows[0][1]) == 500


def test_a_run_without_classes_or_without_evaluation_shows_what_it_has(run_folder):
    generation = load_run(run_folder(task="text-generation"))
    assert doubtful(generation).keys() == {"uncertainty/most_uncertain"}
    curves = uncertainty(generation)
    assert {name: list(curve.lines) for name, curve in curves.items()} == {
        "uncertainty/mutual_information_histogram": ["test"],
        "uncertainty/perplexity_histogram": ["test"],
    }
    nothing = Run("run")
    assert [reliability(nothing), separation(nothing), doubtful(nothing)] == [{}, {}, {}]


def test_a_row_of_a_window_has_the_names_of_the_evaluation_too():
    measures = {"drift/msp/mean": 0.3, "drift/mutual_information/mean": 0.1, "drift/num_rows": 9.0}
    assert window_row(measures, 2) == measures | {
        "monitor/num_alerts": 2.0, "ood/msp_mean": 0.3, "uncertainty/mutual_information": 0.1
    }  # fmt: skip


def scored(name: str, values) -> pa.Table:
    return pa.table({"sample_id": np.arange(len(values)), name: values})


@pytest.mark.parametrize("name", ["confidence", "perplexity"])
def test_a_window_is_drawn_beside_the_reference_on_its_bins(name):
    random = np.random.default_rng(5)
    before, after = random.beta(5, 2, 400), random.beta(2, 2, 100)
    if name == "perplexity":
        before, after = np.exp(9 * before), np.exp(9 * after)
    profile = profile_of(scored(name, before), model_version="v")
    window = Window(scored(name, after), (), "0" * 64, {})
    curve = window_curves(profile, window)[f"drift/{name}_histogram"]

    assert set(curve.lines) == {"reference", "this window"}
    assert max(len(line) for line in curve.lines.values()) <= 50
    for values, line in zip((before, after), curve.lines.values(), strict=True):
        ends = np.array([x for x, _ in line])
        assert np.cumsum([y for _, y in line]) == pytest.approx(
            [(values <= end).mean() for end in ends]
        )


def test_alerts_are_shown_newest_first():
    made = [
        Alert(str(day), "run", None, f"2026-01-0{day}T00:00:00+00:00", "info", "rule", "title")
        for day in (1, 3, 2)
    ]
    assert [row[-1] for row in alert_table(made).rows] == ["3", "2", "1"]


def test_exhibits_have_limits():
    with pytest.raises(ValueError, match="has 10001 points, but trackers take 10000: bin them"):
        Curve("Scores", "x", {"a": [(0.0, 0.0)] * 10_001})
    with pytest.raises(ValueError, match="has 1001 rows"):
        Table(["a"], [[1]] * 1001)
