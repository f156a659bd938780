"""Doctor: one line a finding, what to do in it, and never a traceback."""

import sys

import pytest

from pipeline import doctor


@pytest.fixture
def findings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {finding.subject: finding for finding in doctor.examine()}


def test_the_installation_that_runs_the_tests_is_healthy(findings):
    assert not doctor.broken(list(findings.values()))
    assert findings.keys() >= {"python", "torch", "transformers", "kernel", "devices", "./runs"}


def test_every_finding_is_one_line(findings):
    assert all("\n" not in str(finding) for finding in findings.values())


def test_versions_are_judged_by_the_tested_one_and_the_supported_range():
    assert doctor.judge_version("x", "2.13.0+cpu", "2.13.0", ">=2.9,<3")[0] == "ok"
    assert doctor.judge_version("x", "2.14.0", "2.13.0", ">=2.9,<3")[0] == "note"
    level, text = doctor.judge_version("x", "5.25.0", "5.24.0", ">=5.24,<5.25")
    assert (level, "pip install 'x>=5.24,<5.25'" in text) == ("broken", True)


def test_every_library_looked_at_has_a_tested_version_and_a_range():
    assert (
        set(doctor.LIBRARIES) <= doctor.tested_versions().keys() & doctor.required_ranges().keys()
    )


def test_a_torchvision_that_does_not_fit_is_one_line(tmp_path, monkeypatch):
    package = tmp_path / "torchvision"
    package.mkdir()
    package.joinpath("__init__.py").write_text(
        "raise RuntimeError('operator nms\\ndoes not exist')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    ((level, text),) = doctor._torchvision()
    assert level == "broken"
    assert "operator nms does not exist" in text
    assert "pip uninstall torchvision" in text


def test_a_look_that_fails_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "_LOOKS", {"kernel": doctor._kernel})
    monkeypatch.setitem(sys.modules, "pipeline.dropout.kernels", None)
    (finding,) = doctor.examine()
    assert (finding.level, finding.subject) == ("broken", "kernel")


def test_a_folder_that_cannot_be_written_is_broken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file in the place of the folder")
    ((level, text),) = doctor._runs()
    assert level == "broken"
    assert "output_dir" in text
