"""Checkpoints that exist once their manifest does: commit, verify, find and rotate them.

A save cut off at any byte leaves a folder without a manifest that fits: it is passed over, by name.
"""

import errno
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pipeline.errors import CheckpointError, RunFolderError
from pipeline.records import flush, sha256_of_file, write_json

MANIFEST = "manifest.json"
SCHEMA = "masklock-checkpoint-v1"
# What torch.save and safetensors say instead of an OSError when the disk is full.
_FULL_DISK_PHRASES = ("no space left", "os error 28", "pytorchstreamwriter", "disk quota")


def commit(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Flush every file of the folder and write the manifest: from here on the checkpoint exists."""
    flush_tree(checkpoint)
    files = {
        path.relative_to(checkpoint).as_posix(): {
            "size": path.stat().st_size,
            "sha256": sha256_of_file(path),
        }
        for path in _files(checkpoint)
    }
    write_json(checkpoint / MANIFEST, {"schema": SCHEMA, **facts, "files": files})
    flush(checkpoint.parent)


def flush_tree(folder: Path) -> None:
    """Make every file below a folder, and their names, survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest's content; an empty dict when it is missing or unreadable."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one sentence each; an empty list when it is whole."""
    if not (checkpoint / MANIFEST).is_file():
        return [f"it has no {MANIFEST}, so its save was cut off"]
    manifest = read_manifest(checkpoint)
    if manifest.get("schema") != SCHEMA or not isinstance(manifest.get("files"), dict):
        return [f"its {MANIFEST} is not one that this version writes"]
    problems = (
        _problem(checkpoint / name, name, entry) for name, entry in manifest["files"].items()
    )
    return [problem for problem in problems if problem is not None]


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a message for each newer one that does not."""
    passed_over: list[str] = []
    for checkpoint in reversed(list_checkpoints(run)):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name} is passed over: {'; '.join(problems)}")
    return None, passed_over


def list_checkpoints(run: Path) -> list[Path]:
    """All checkpoint folders of a run, torn ones too, by step."""
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0)


def step_of(checkpoint: Path) -> int | None:
    """The step in the folder's name; None when it is not a checkpoint's."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def is_finished(checkpoint: Path, max_steps: int, patience: int | None) -> bool:
    """Whether no step is left: all done, or early stopping had decided before the save."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    saved = (state.get("stateful_callbacks") or {}).get("EarlyStoppingCallback")
    waited = saved["attributes"]["early_stopping_patience_counter"] if saved else 0
    return state["global_step"] >= max_steps or (patience is not None and waited >= patience)


def rotate(run: Path, keep: int, best: Path | None) -> list[Path]:
    """Delete all but the newest `keep` committed checkpoints and the best one; say which went."""
    checkpoints = list_checkpoints(run)
    committed = [path for path in checkpoints if (path / MANIFEST).is_file()]
    kept = {*committed[-keep:], *([best] if best else [])}
    gone = [path for path in checkpoints if path not in kept]
    for path in gone:
        remove(path)
    return gone


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first: one that is half deleted does not exist."""
    if checkpoint.is_dir():
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


def require_space(run: Path, needed_bytes: int) -> None:
    """Refuse to start a run whose first checkpoint would not fit on the disk."""
    free = free_bytes(run)
    if free < needed_bytes:
        raise RunFolderError(
            f"A checkpoint needs about {_megabytes(needed_bytes)} in {run}, but only "
            f"{_megabytes(free)} are free. Free some space, or choose another output_dir."
        )


def free_bytes(folder: Path) -> int:
    """Free bytes where this folder is, or would be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def save_error(checkpoint: Path, error: BaseException) -> CheckpointError | None:
    """The error of a full disk in words that help; None when it is about something else."""
    code = getattr(error, "errno", None)
    text = str(error).lower()
    is_full = code in (errno.ENOSPC, errno.EDQUOT)
    if not is_full and not any(phrase in text for phrase in _FULL_DISK_PHRASES):
        return None
    older, _ = newest_whole(checkpoint.parent)
    stands = f"{older.name} is whole" if older else "There is no older checkpoint"
    return CheckpointError(
        f"The disk is full: {checkpoint} could not be saved "
        f"({_megabytes(free_bytes(checkpoint))} are free). {stands}. Free some space and run "
        "the same command again: it goes on from there."
    )


def _problem(path: Path, name: str, entry: dict[str, Any]) -> str | None:
    """How a file differs from its entry in the manifest; sizes first, they cost nothing."""
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{name} is {size:,} bytes, manifest says {entry['size']:,}"
    if sha256_of_file(path) != entry["sha256"]:
        return f"{name} has other content than when it was saved (sha256)"
    return None


def _files(checkpoint: Path) -> list[Path]:
    """Every file below the folder but the manifest, in a fixed order."""
    found = (path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    return [path for path in found if path != checkpoint / MANIFEST]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


@contextmanager
def module_names(model: Any, unless: bool = False) -> Iterator[None]:
    """For a while `save_pretrained` names weights as the model's modules do.

    Some architectures (ViT) are saved under the older names of their files; the Trainer, which goes
    on by `load_state_dict`, would find none of those.
    """
    if unless or not isinstance(model, PreTrainedModel):  # an adapter is named as it is loaded
        yield
        return
    save = partial(model.save_pretrained, save_original_format=False)
    vars(model)["save_pretrained"] = save
    try:
        yield
    finally:
        del vars(model)["save_pretrained"]


def require_all_found(unexpected: Sequence[str]) -> None:
    """Refuse a checkpoint with weights that the model does not have.

    Raises:
        RunFolderError: with some of their names.
    """
    if unexpected:
        raise RunFolderError(
            f"The checkpoint holds {len(unexpected)} weights that this model does not have, such "
            f"as {', '.join(sorted(unexpected)[:3])}: it was written by another version of "
            "transformers or of Masklock. Going on would begin those anew: choose another name."
        )
