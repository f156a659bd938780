"""The quickstart: its stages in order, each given what it needs of the others."""

import pytest

from pipeline import quickstart as module
from pipeline.errors import InputError
from pipeline.quickstart import quickstart


def test_it_trains_evaluates_keeps_a_profile_and_reports(monkeypatch, tmp_path):
    import pipeline.evaluation.stage
    import pipeline.train

    calls = []

    def evaluate(run, config, say, exhibits, keep_profile):
        calls.append("evaluate")
        keep_profile(run, "scored rows")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline.train, "train", lambda config, say: calls.append("train") or 0)
    monkeypatch.setattr(pipeline.evaluation.stage, "evaluate", evaluate)
    found = quickstart(
        "language",
        exhibits=lambda run: {},
        keep_profile=lambda run, rows: calls.append(rows),
        report=lambda run: run.path / "report.html",
        say=calls.append,
    )
    assert calls[:3] == ["train", "evaluate", "scored rows"]
    assert calls[3].startswith("The reference is runs/quickstart/profile: masklock monitor runs/")
    assert found.as_posix() == "runs/quickstart/report.html"


def test_a_training_that_was_stopped_is_not_evaluated(monkeypatch):
    import pipeline.train

    monkeypatch.setattr(pipeline.train, "train", lambda config, say: 75)
    with pytest.raises(SystemExit) as caught:
        quickstart("language", None, None, None, print)
    assert caught.value.code == 75


def test_another_modality_is_refused_by_name():
    with pytest.raises(InputError, match="no quickstart for 'smell' yet; there is one for: lang"):
        quickstart("smell", None, None, None, None)
    assert {"language", "speech", "vision"} <= set(module.QUICKSTARTS)
