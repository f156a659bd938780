"""`registry` and `retrain` as a user types them."""

import json
import os

import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.records import RunFolder, write_json, write_text


@pytest.fixture
def masklock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.chdir(tmp_path)

    def run(*words: str):
        return CliRunner().invoke(app, list(words), catch_exceptions=False)

    return run


@pytest.fixture
def two(tmp_path, masklock):
    """Two versions, both promoted."""
    names = []
    for weights in "ab":
        run = RunFolder(tmp_path / weights)
        write_text(run.config, f"name: {weights}\n")
        write_json(run.plan, {})
        write_text(run.model / "weights", weights)
        names.append(masklock("registry", "register", weights).output.strip())
        masklock("registry", "promote", names[-1], "--reason", f"try {weights}")
    return names


def test_a_registry_is_listed_shown_and_rolled_back(masklock, two, tmp_path):
    listed = masklock("registry", "list").output
    assert f"previous    {tmp_path / 'a'}" in listed
    found = json.loads(masklock("registry", "list", "--json").output)
    assert [version["is"] for version in found["versions"]] == [["previous"], ["champion"]]
    assert json.loads(masklock("registry", "show", "--verify").output)["name"] == two[1]
    assert masklock("registry", "show", "previous", "--run").output == f"{tmp_path / 'a'}\n"
    moved = masklock("registry", "rollback", "--reason", "bad").output
    assert moved == f"The champion is {two[0]}; a rollback would return to None.\n"
    journal = masklock("registry", "journal").output.splitlines()
    assert journal[0].endswith(f"promote     nothing -> {two[0]}  try a")
    assert journal[-1].endswith(f"rollback    {two[1]} -> {two[0]}  bad")


def test_an_empty_registry_says_how_to_begin(masklock):
    said = masklock("registry", "list").output
    assert said == "runs/registry holds no versions yet: masklock registry register RUN\n"


@pytest.mark.parametrize("words", [[], ["--once", "--explain"], ["--explain", "--trigger=manual"]])
def test_retrain_does_one_thing_at_a_time(masklock, words):
    found = masklock("retrain", "policy.yaml", *words)
    assert found.exit_code == 2
