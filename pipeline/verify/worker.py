"""One process of one layout: trains a few steps under watch and leaves a record.

Started by `stage.py`, under a launcher where the layout has several processes:
`python -m pipeline.verify.worker CONFIG.yaml RECORD_FOLDER LAYOUT [--stop-after STEP]`.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pipeline import parallel
from pipeline.config.load import load_config
from pipeline.errors import MasklockError
from pipeline.train import Instrument, train
from pipeline.verify.layouts import parse_layouts
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


def padded(collate: Collate, width: int) -> Collate:
    """The same batches with `width` more padding positions, masked out, behind every row."""

    def wider(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        return {
            name: torch.nn.functional.pad(value, (0, width), value=_filler(name, value))
            if value.dim() == 2
            else value
            for name, value in batch.items()
        }

    return wider


def _filler(name: str, value: Tensor) -> int:
    return -100 if name == "labels" else 0


def instrument_for(probe: Probe, extra_padding: int, stop_after: int | None) -> Instrument:
    """What a layout changes in a trainer that is ready to start."""

    def instrument(trainer: Any) -> None:
        trainer.keyed.observer = probe.observe
        if extra_padding:
            trainer.data_collator = padded(trainer.data_collator, extra_padding)
        if stop_after is not None:
            trainer.add_callback(StopAfter(stop_after))

    return instrument


def main() -> int:
    """Run one process of one layout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("record", type=Path)
    parser.add_argument("layout")
    parser.add_argument("--stop-after", type=int)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    (layout,) = parse_layouts(arguments.layout)
    probe = Probe()
    instrument = instrument_for(probe, layout.extra_padding, arguments.stop_after)
    try:
        code = train(load_config(arguments.config), print_line, instrument)
    except MasklockError as error:
        print_line(f"masklock: {error}")
        return error.exit_code
    part = "first" if arguments.stop_after is not None else "last"
    probe.write(arguments.record / f"{part}-{parallel.rank()}.json")
    return code


def print_line(line: str) -> None:
    """For the log of this layout."""
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
