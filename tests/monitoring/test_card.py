"""The model card: what the hub's own reader finds in it, and that nothing in a run can break it."""

import json

import pytest
from huggingface_hub import ModelCard

from monitoring.card import render_card, write_card
from monitoring.run import load_run
from pipeline.errors import RunFolderError
from pipeline.records import RunFolder, write_json


@pytest.fixture
def card(whole_run):
    return render_card(load_run(whole_run), None)


def table_under(card: str, title: str) -> list[list[str]]:
    section = card.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[text.strip() for text in line.strip("|").split("|")] for line in lines]


def test_the_hub_reads_the_measured_numbers_from_its_front_matter(card, whole_run):
    report = json.loads(whole_run.report_json.read_text())
    data = ModelCard(card).data
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert data.pipeline_tag == "text-classification"
    assert found["accuracy"] == round(report["quality"]["mc"]["accuracy"], 4)


def test_calibration_is_that_of_the_report(card, whole_run):
    report = json.loads(whole_run.report_json.read_text())
    rows = {row[0]: row[1] for row in table_under(card, "Calibration")}
    assert rows["Monte-Carlo"] == f"{report['calibration']['mc']['ece']:.3f}"


def test_every_table_has_as_many_cells_in_every_row(card):
    for title in ("Quality", "Calibration", "Uncertainty", "Out-of-distribution inputs"):
        assert len({len(row) for row in table_under(card, title)}) == 1, title


def test_no_name_becomes_markup_or_a_column_of_its_own(whole_run, tmp_path):
    report = json.loads(whole_run.report_json.read_text())
    report["verdict"] = ["<script>alert(1)</script> | [x](javascript:y)\n# title"]
    folder = RunFolder(tmp_path)
    write_json(folder.report_json, report)
    card = render_card(load_run(folder), None)
    assert "<script" not in card
    assert "\n# title" not in card
    assert "\\| \\[x\\](javascript:y) \\# title" in card


def test_the_card_lies_beside_the_weights(whole_run):
    whole_run.model.mkdir(exist_ok=True)
    assert write_card(whole_run) == whole_run.model / "README.md"


def test_a_run_that_was_not_evaluated_has_nothing_to_say(tmp_path):
    with pytest.raises(RunFolderError, match="masklock evaluate RUN"):
        write_card(RunFolder(tmp_path))
