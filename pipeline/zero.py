"""DeepSpeed checkpoints on another number of processes or another ZeRO stage.

DeepSpeed reads its shards only on the layout that wrote them; its own converter turns them into a
universal checkpoint, which any layout reads.
"""

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import trainer as trainer_module

from pipeline import checkpoint, parallel
from pipeline.errors import CheckpointError

UNIVERSAL = ".universal"


def family(zero_stage: int | None) -> str:
    """Who reads whose optimizer states: the converter goes between stages 1 and 2, not to 3."""
    return {None: "PyTorch", 3: "DeepSpeed ZeRO-3"}.get(zero_stage, "DeepSpeed ZeRO-1 or 2")


def stage_of(engine: Any) -> int:
    """The ZeRO stage that an engine runs."""
    return int(engine.zero_optimization_stage())


@contextlib.contextmanager
def loading_any_layout(is_readable: Callable[[Path], bool]) -> Iterator[None]:
    """The Trainer loads DeepSpeed's checkpoints by a function of its module: ours meanwhile.

    Args:
        is_readable: whether the engine can read a checkpoint's optimizer state; where not, the
            weights alone were loaded before.
    """
    native = trainer_module.deepspeed_load_checkpoint

    def load_any(engine: Any, folder: str, load_module_strict: bool = True) -> None:
        if is_readable(Path(folder)):
            once = partial(native, engine, folder, load_module_strict=load_module_strict)
            load(engine, Path(folder), checkpoint.read_manifest(Path(folder)), once)

    trainer_module.deepspeed_load_checkpoint = load_any
    try:
        yield
    finally:
        trainer_module.deepspeed_load_checkpoint = native


def load(engine: Any, folder: Path, manifest: Mapping[str, Any], native: Any) -> None:
    """Load a ZeRO checkpoint into an engine of any stage on any number of processes.

    Args:
        engine: a DeepSpeedEngine, just made.
        folder: the checkpoint.
        manifest: its manifest: `world_size` and `zero_stage` say which layout wrote it.
        native: loads a checkpoint of the same layout, without arguments.
    """
    then = manifest.get("world_size"), manifest.get("zero_stage")
    if then == (parallel.world_size(), stage_of(engine)):
        native()
        return
    universal = folder.parent / UNIVERSAL
    if parallel.is_main():
        convert(folder, universal)
    parallel.barrier()
    try:
        _load_universal(engine, universal)
    finally:
        parallel.barrier()
        if parallel.is_main():
            shutil.rmtree(universal, ignore_errors=True)


def convert(folder: Path, universal: Path) -> None:
    """Run DeepSpeed's converter on the shards of a checkpoint."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(universal, ignore_errors=True)
    (shards,) = folder.glob("global_step*")
    words = {"input_folder": str(shards), "output_folder": str(universal / shards.name)}
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    (universal / shards.name).mkdir(parents=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(
                Namespace(**words, **options, strict=True, inject_missing_state=True)
            )
    except Exception as error:
        raise CheckpointError(
            f"{folder} was written by another number of processes or ZeRO stage, and DeepSpeed's "
            f"converter cannot read it: {error}. Go on with the layout that wrote it."
        ) from error


def _load_universal(engine: Any, universal: Path) -> None:
    groups = engine.optimizer.optimizer.param_groups
    before = [dict(group) for group in groups]
    engine._config.load_universal_checkpoint = True
    try:
        loaded, _ = engine.load_checkpoint(
            str(universal), load_optimizer_states=True, load_lr_scheduler_states=True
        )
    finally:
        engine._config.load_universal_checkpoint = False
    if loaded is None:
        raise CheckpointError(f"DeepSpeed could not load the universal checkpoint in {universal}.")
    if stage_of(engine) == 3:
        _part_groups(engine.optimizer.optimizer, before)


def _part_groups(optimizer: Any, before: list[dict[str, Any]]) -> None:
    """Undo what DeepSpeed's ZeRO-3 loader makes common to all groups of parameters.

    It gives them one step counter, which each group would then count up, and the settings of the
    first group: weight decay on biases and norms.
    """
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    for group, own in zip(optimizer.param_groups, before, strict=True):
        group.update({name: value for name, value in own.items() if name not in ("params", "lr")})
