"""One start of one layout: trains a few steps under watch and leaves a record.

Started by `stage.py`: `python -m pipeline.verify.worker CONFIG.yaml RECORD_FOLDER LAYOUT START`,
which hands over to a launcher first where the start has several processes.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pipeline import engines, parallel
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.errors import MasklockError
from pipeline.failure import failing_together
from pipeline.train import Instrument, train
from pipeline.verify.layouts import NUM_STEPS, Layout, parse_layouts
from pipeline.verify.probe import Probe

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


class StopAfter(TrainerCallback):
    """Stops like a user would, by a signal, once a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Signal this process after its step."""
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def padded(collate: Collate, width: int, limit: int | None) -> Collate:
    """The same batches with more padding positions, masked out, behind every row.

    Batches without tokens, of images and sounds, stay as they are.

    Args:
        collate: what makes a batch.
        width: positions to add.
        limit: positions that the model has; None: any number.
    """

    def wider(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        if "input_ids" not in batch:
            return batch
        room = width if limit is None else limit - batch["input_ids"].shape[1]
        more = max(0, min(width, room))
        return {
            name: torch.nn.functional.pad(value, (0, more), value=_filler(name))
            if value.dim() == 2
            else value
            for name, value in batch.items()
        }

    return wider


def _filler(name: str) -> int:
    return {"labels": -100, "sample_id": -1}.get(name, 0)


def instrument_for(probe: Probe, layout: Layout, start: int) -> Instrument:
    """What a layout changes in a trainer that is ready to start."""

    def instrument(trainer: Any) -> None:
        trainer.keyed.observer = probe.observe
        if not trainer.is_deepspeed_enabled:
            watch_gradients(trainer, probe)
        if layout.extra_padding:
            limit = getattr(trainer.model.config, "max_position_embeddings", None)
            room = limit - 2 if limit else None  # some models keep two positions for themselves
            trainer.data_collator = padded(trainer.data_collator, layout.extra_padding, room)
        if start < len(layout.num_processes) - 1:
            trainer.add_callback(StopAfter(NUM_STEPS // 2))

    return instrument


def watch_gradients(trainer: Any, probe: Probe) -> None:
    """Look at the gradients of every step just before they are clipped.

    The Trainer calls this function of its accelerator once a step, without a limit where nothing
    is to be clipped; its callback for it comes too late.
    """
    clip = trainer.accelerator.clip_grad_norm_

    def watched(*args: Any, **kwargs: Any) -> Any:
        probe.keep_gradients(trainer.state.global_step, trainer.model)
        return clip(*args, **kwargs)

    trainer.accelerator.clip_grad_norm_ = watched


def run(
    config: RunConfig,
    folder: Path,
    layout: Layout,
    start: int = 0,
    also: Instrument | None = None,
) -> int:
    """Train in this process and leave its record.

    Args:
        config: of the short run.
        folder: takes the record.
        layout: how the steps are run.
        start: which start of the layout this is.
        also: looks into, or changes, the trainer after the layout has; for proving.
    """
    probe = Probe()
    own = instrument_for(probe, layout, start)

    def instrument(trainer: Any) -> None:
        own(trainer)
        if also is not None:
            also(trainer)

    code = train(config, print_line, instrument)
    probe.write(folder / f"{start}-{parallel.rank()}.json")
    parallel.barrier()  # the first process that ends with 75 makes the launcher end the others
    return code


def main(words: Sequence[str] | None = None, also: Instrument | None = None) -> int:
    """Run one process of one start, or launch all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("folder", type=Path)
    parser.add_argument("layout")
    parser.add_argument("start", type=int)
    given, _ = parser.parse_known_args(words)  # deepspeed adds a rank
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    (layout,) = parse_layouts(given.layout)
    preset = layout.preset(given.start)
    if preset is not None and "RANK" not in os.environ:
        module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
        arguments = [given.config, str(given.folder), given.layout, str(given.start)]
        return engines.launch(preset, layout.num_processes[given.start], arguments, module)
    try:
        with failing_together(print_line):
            sys.exit(run(load_config(given.config), given.folder, layout, given.start, also))
    except MasklockError as error:
        print_line(f"masklock: {error}")
        return error.exit_code


def print_line(line: str) -> None:
    """For the log of this layout."""
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
