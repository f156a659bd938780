"""The registry of models: versions that do not change, aliases that move whole, any kill mended."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launch.registry import Registry
from pipeline.errors import BusyError, RegistryError
from pipeline.locking import file_lock
from pipeline.records import RunFolder, write_json, write_text


class Killed(BaseException):
    pass


def a_run(folder: Path, weights: str) -> RunFolder:
    run = RunFolder(folder / f"run-{weights}")
    write_text(run.config, f"name: {weights}\n")
    write_json(run.plan, {"digest": "0"})
    write_text(run.model / "weights", weights)
    write_json(run.report_json, {"accuracy": 0.9})
    return run


def clock() -> datetime:
    return datetime(2026, 3, 2, tzinfo=UTC)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return Registry(tmp_path / "registry", clock)


@pytest.fixture
def three(registry, tmp_path):
    """Three versions, promoted one after the other."""
    names = [registry.register(a_run(tmp_path, weights)).name for weights in "abc"]
    for name in names:
        registry.promote(name)
    return names


def champions(registry):
    aliases = registry.aliases()
    return aliases.champion, aliases.previous


def test_a_version_holds_what_later_stages_need_and_is_a_run_folder(registry, tmp_path):
    version = registry.register(a_run(tmp_path, "a"), {"by": "me"})
    assert set(version.files) == {
        *("config.yaml", "plan.json", "model/weights", "evaluation/report.json")
    }
    assert version.run.model.is_dir()
    assert registry.get(version.name) == version
    assert version.origin == {"run": str(tmp_path / "run-a"), "by": "me"}


def test_folders_of_a_version_are_closed(registry, tmp_path):
    folder = registry.register(a_run(tmp_path, "a")).folder
    for inner in (folder, folder / "model", folder / "evaluation"):
        assert inner.stat().st_mode & 0o222 == 0


def test_the_same_model_is_registered_once(registry, tmp_path):
    first = registry.register(a_run(tmp_path, "a"))
    write_json(RunFolder(tmp_path / "run-a").report_json, {"accuracy": 0.91})
    assert registry.register(RunFolder(tmp_path / "run-a")) == first


def test_an_unfinished_run_is_refused(registry, tmp_path):
    write_text(tmp_path / "half" / "config.yaml", "name: half\n")
    with pytest.raises(RegistryError, match=r"has no plan\.json, no model"):
        registry.register(RunFolder(tmp_path / "half"))
    assert registry.versions() == []


def test_promotion_keeps_the_champion_before(registry, three):
    assert champions(registry) == (three[2], three[1])
    assert registry.promote(three[2]).number == registry.aliases().number, "nothing to move"


def test_rollbacks_walk_back_and_end_with_a_sentence(registry, three):
    registry.rollback("bad")
    assert champions(registry) == (three[1], three[0])
    registry.rollback()
    with pytest.raises(RegistryError, match="no version before"):
        registry.rollback()
    assert champions(registry) == (three[0], None)


def test_the_journal_tells_every_change(registry, three):
    registry.set_challenger(three[0], "try again")
    registry.rollback("bad")
    told = [(change["number"], change["action"]) for change in registry.journal()]
    assert told == [*((n, "promote") for n in (1, 2, 3)), (4, "challenger"), (5, "rollback")]
    assert registry.journal()[-1]["champion"] == three[1]
    assert registry.journal()[-1]["reason"] == "bad"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "plan.json").unlink(), r"plan\.json is missing"),
        (lambda folder: (folder / "model" / "extra").write_text("x"), "model/extra was added"),
        (
            lambda folder: (folder / "model" / "weights").write_text("x"),
            "model/weights has changed",
        ),
    ],
)
def test_a_version_that_was_changed_is_not_promoted(registry, three, damage, said):
    folder = registry.get(three[0]).folder
    for inner in (folder, folder / "model"):
        inner.chmod(0o755)
    damage(folder)
    with pytest.raises(RegistryError, match=said):
        registry.promote(three[0])
    assert champions(registry) == (three[2], three[1])


def test_unknown_versions_and_missing_aliases_are_explained(registry, tmp_path):
    with pytest.raises(RegistryError, match="has no champion yet"):
        registry.get("champion")
    name = registry.register(a_run(tmp_path, "a")).name
    with pytest.raises(RegistryError, match=f"There are: {name}"):
        registry.get("v0009-00000000")
    with pytest.raises(RegistryError, match="is not there"):
        registry.get("../versions")


def test_a_champion_moved_meanwhile_stops_who_expected_another(registry, three):
    with pytest.raises(RegistryError, match="somebody else has moved it"):
        registry.promote(three[0], expected_champion=three[1])
    with pytest.raises(RegistryError, match="Nothing was changed"):
        registry.rollback(expected_champion=three[0])


def test_writers_exclude_each_other(registry, three, monkeypatch):
    monkeypatch.setattr("launch.registry._LOCK_SECONDS", 0.05)
    with file_lock(registry.folder / ".lock", 0.0, "it"), pytest.raises(BusyError):
        registry.promote(three[0])


def _promote_in_turn(folder: Path, names: list[str]) -> None:
    for name in names * 5:
        Registry(folder, clock).promote(name)


def test_promoters_at_the_same_time_leave_every_change_in_the_journal(registry, three):
    with ThreadPoolExecutor() as racers:
        for order in (three, three[::-1]):
            racers.submit(_promote_in_turn, registry.folder, order)
    numbers = [change["number"] for change in registry.journal()]
    assert numbers == list(range(1, registry.aliases().number + 1))
    before = [change["before"] for change in registry.journal()][1:]
    assert before == [change["champion"] for change in registry.journal()][:-1]


@pytest.mark.parametrize(
    "point",
    [
        *("register: files copied", "register: version named"),
        *("promote: aliases moved", "promote: journal written"),
        *("rollback: aliases moved", "rollback: journal written"),
    ],
)
def test_a_kill_at_any_point_is_mended_by_the_next_writer(registry, three, tmp_path, point):
    def reach(reached):
        if reached == point:
            raise Killed

    doomed = Registry(registry.folder, clock, reach)
    action = {
        "register": lambda: doomed.register(a_run(tmp_path, "d")),
        "promote": lambda: doomed.promote(three[0]),
        "rollback": doomed.rollback,
    }[point.partition(":")[0]]
    with pytest.raises(Killed):
        action()
    for version in registry.versions():
        registry.verify(version)
    fourth = registry.register(a_run(tmp_path, "d")).name
    registry.promote(fourth)
    assert [change["number"] for change in registry.journal()] == list(
        range(1, registry.aliases().number + 1)
    )
    assert len(registry.versions()) == 4
    assert list(registry.versions_folder.glob(".*")) == []


def test_a_damaged_alias_file_is_an_error_that_says_where_to_look(registry, three):
    (registry.folder / "aliases.json").write_text("{")
    with pytest.raises(RegistryError, match="last line of"):
        registry.get("champion")


def test_weights_share_the_bytes_of_the_run(registry, tmp_path):
    run = a_run(tmp_path, "a")
    version = registry.register(run)
    assert os.path.samefile(version.run.model / "weights", run.model / "weights")
    assert not os.path.samefile(version.run.plan, run.plan)
    written = json.loads((version.folder / "manifest.json").read_text())
    assert written["schema"] == "masklock-registry-v1"
