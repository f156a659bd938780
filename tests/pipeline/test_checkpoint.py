"""A checkpoint exists once its manifest verifies; torn ones are named; rotation comes last."""

import errno
import json

import pytest

from pipeline import checkpoint
from pipeline.errors import RunFolderError


@pytest.fixture
def saved(tmp_path):
    """Makes `checkpoint-<step>` in the run folder, committed unless told otherwise."""

    def save(step, commit=True):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "nested").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes([step % 256]) * 4096)
        (folder / "nested" / "optimizer.pt").write_bytes(b"moments")
        if commit:
            checkpoint.commit(folder, {"step": step, "world_size": 1})
        return folder

    return save


def test_a_committed_checkpoint_verifies_and_remembers_its_facts(saved):
    folder = saved(20)
    assert checkpoint.verify(folder) == []
    manifest = checkpoint.read_manifest(folder)
    assert manifest["step"] == 20
    assert set(manifest["files"]) == {"model.safetensors", "nested/optimizer.pt"}


def test_a_torn_checkpoint_is_passed_over_and_said_so(saved, tmp_path):
    whole, torn = saved(20), saved(40)
    with open(torn / "model.safetensors", "r+b") as file:
        file.truncate(1024)
    found, messages = checkpoint.newest_whole(tmp_path)
    assert found == whole
    assert messages == [
        "checkpoint-40 is passed over: model.safetensors is 1,024 bytes, manifest says 4,096"
    ]


def test_a_save_cut_off_before_its_manifest_does_not_exist(saved, tmp_path):
    saved(40, commit=False)
    found, (message,) = checkpoint.newest_whole(tmp_path)
    assert found is None
    assert "has no manifest.json" in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 4096), "has other content"),
        (lambda f: (f / "nested" / "optimizer.pt").unlink(), "nested/optimizer.pt is missing"),
        (lambda f: (f / "manifest.json").write_text('{"files":'), "is not one that"),
        (lambda f: (f / "manifest.json").write_text(json.dumps({"files": 3})), "is not one that"),
    ],
)
def test_every_kind_of_damage_is_named(saved, damage, words):
    folder = saved(20)
    damage(folder)
    (problem,) = checkpoint.verify(folder)
    assert words in problem


def test_steps_are_ordered_as_numbers_and_other_folders_are_not_checkpoints(saved, tmp_path):
    for step in (100, 20, 9):
        saved(step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [
        9,
        20,
        100,
    ]


def test_rotation_keeps_the_newest_and_the_best_and_drops_torn_ones(saved, tmp_path):
    best = saved(10)
    for step in (20, 30, 40):
        saved(step)
    saved(35, commit=False)
    checkpoint.rotate(tmp_path, keep=2, best=best)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-10", "checkpoint-30", "checkpoint-40"]


def test_a_disk_without_room_is_refused_before_the_run(tmp_path):
    with pytest.raises(RunFolderError, match="needs about 1,000,000,000 MB"):
        checkpoint.require_space(tmp_path / "not" / "there", 10**15)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing"),
    ],
)
def test_a_full_disk_says_which_checkpoint_stands(saved, tmp_path, error):
    saved(20)
    message = str(checkpoint.save_error(tmp_path / "checkpoint-40", error))
    assert "checkpoint-20 is whole" in message
    assert "run the same command again" in message


def test_other_errors_of_a_save_are_not_blamed_on_the_disk(tmp_path):
    assert checkpoint.save_error(tmp_path / "checkpoint-40", RuntimeError("CUDA error")) is None
