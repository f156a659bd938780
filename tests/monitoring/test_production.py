"""The page of production: what the history holds, said in the right order, whatever it holds."""

import pytest

from monitoring.alerts import Alert
from monitoring.history import History, WindowRecord
from monitoring.production import content_of, load_production, write_monitor_page
from monitoring.report import render_report
from pipeline.errors import RunFolderError
from pipeline.records import RunFolder, append_jsonl

ATTACK = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'"


def column(name="energy", effect=0.02, drifted=False):
    return {
        "column": name,
        "kind": "numeric",
        "num_rows": 80,
        "tests": {},
        "p_value": 0.2,
        "adjusted_p_value": 0.4,
        "effect": effect,
        "effect_name": "ks",
        "min_effect": 0.1,
        "drifted": drifted,
        "note": "",
    }


def window(number, outcome="quiet", columns=(), **measures):
    estimate = {"estimate": 0.7, "lower": 0.6, "upper": 0.8, "reference": 0.75, "p_value": None}
    return WindowRecord(
        sha256=f"{number:064d}",
        created=f"2026-11-{number:02d}T10:00:00+00:00",
        num_rows=80,
        outcome=outcome,
        measures={"drift/sequential/doubt": 0.1 * number, **measures},
        details={"columns": list(columns), "performance": {"estimated_accuracy": estimate}},
    )


def alert(number, severity="warning", state="open", text="a row"):
    return Alert(
        id=f"{number:016d}",
        run="r",
        model_version="v",
        created=f"2026-11-{number:02d}T10:00:00+00:00",
        severity=severity,
        rule="columns_drifted",
        title=f"alert {number} of {text}",
        evidence={"metric": text, "value": 3.0},
        rows=[{"sample_id": 5, "place": 1, "value": 0.5, "text": text}],
        window={"sha256": f"{number:064d}", "kept": "windows/x.parquet"},
        runbook=f"look at {text}",
        state=state,
    )


@pytest.fixture
def run(tmp_path):
    """A run folder whose history holds three windows; the last two raised alerts."""
    folder = RunFolder(tmp_path / "run")
    with History(folder.monitoring / "history.sqlite") as history:
        history.add_window(window(1, columns=[column()]))
        history.add_window(
            window(2, "alert", [column(effect=0.3, drifted=True), column("confidence")]),
            alerts=[alert(2)],
        )
        history.add_window(
            window(3, "alert", [column(effect=0.5, drifted=True), column("confidence")]),
            alerts=[alert(3, "critical", text=ATTACK)],
        )
    return folder


def test_the_first_sentences_say_what_someone_who_was_called_needs(run):
    state = content_of(load_production(run))["state"]
    assert state[0].startswith("The last window, of 80 rows, was judged 2026-11-03 10:00:00 UTC")
    assert state[1].startswith("2 alerts are open, the most serious critical: alert 3")
    assert state[2] == "1 of the last 3 windows were quiet."


def test_the_latest_alert_comes_first_with_its_replay(run):
    content = content_of(load_production(run))
    assert [one["id"] for one in content["alerts"]] == [f"{n:016d}" for n in (3, 2)]
    page = write_monitor_page(run).read_text()
    assert f"masklock replay monitoring/alerts/{3:016d}.json" in page


def test_columns_that_drifted_come_first_in_the_grid(run):
    grid = content_of(load_production(run))["grid"]
    assert [row["name"] for row in grid["rows"]] == ["energy", "confidence"]
    assert [cell["drifted"] for cell in grid["rows"][0]["cells"]] == [False, True, True]
    assert grid["rows"][1]["cells"][0]["title"].endswith("not judged")
    assert grid["num_moved"] == 1


def test_what_a_row_or_a_title_holds_is_text_only(run):
    page = write_monitor_page(run).read_text()
    assert "<script" not in page
    assert "onerror=alert(2)>" not in page.replace("onerror=alert(2)&gt;", "")
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_the_page_asks_nobody_for_anything(run):
    page = write_monitor_page(run).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_the_report_gains_the_section(run):
    append_jsonl(run.metrics, {"time": 0.0, "step": 1, "train/loss": 1.0})
    page = render_report(run)
    assert '<section id="production">' in page
    assert '<a href="#production">' in page


def test_a_report_without_production_has_no_such_section(tmp_path):
    folder = RunFolder(tmp_path)
    append_jsonl(folder.metrics, {"time": 0.0, "step": 1, "train/loss": 1.0})
    assert 'id="production"' not in render_report(folder)


def test_before_the_first_window_the_error_says_what_to_do(tmp_path):
    with pytest.raises(RunFolderError, match="masklock monitor RUN --window FILES"):
        write_monitor_page(RunFolder(tmp_path))


def test_one_window_is_enough_for_a_page(tmp_path):
    folder = RunFolder(tmp_path)
    with History(folder.monitoring / "history.sqlite") as history:
        history.add_window(window(1))
    assert "No alert is open." in write_monitor_page(folder).read_text()
