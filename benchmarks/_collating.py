"""Samples a second of a collator, and what drawing by key costs it.

Keyed and unkeyed are timed alternately, by CPU time; the loader with workers by the wall.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

import numpy as np
from _timing import cpu_seconds, wall_seconds
from torch.utils.data import DataLoader

from pipeline.config.schema import RunConfig
from pipeline.modality import MODALITIES

NUM_ROWS, BATCH_SIZE, NUM_REPEATS = 256, 32, 7


def compare(
    config: RunConfig,
    rows: list[dict[str, Any]],
    unkeyed_draws: Callable[[np.random.Generator], AbstractContextManager[Any]],
    plural: str,
) -> None:
    """Time the collator of a run on these rows, and print.

    Args:
        config: the run, with its augmentation.
        rows: NUM_ROWS samples of one training step.
        unkeyed_draws: while it is entered, numbers come from this generator instead of a key.
        plural: what the samples are.
    """
    task = MODALITIES[config.model.task]
    collate = task.collator(task.load_processor(config), config)
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, NUM_ROWS, BATCH_SIZE)]
    generator = np.random.default_rng(1)

    def keyed() -> None:
        for batch in batches:
            collate(batch)

    def unkeyed() -> None:
        with unkeyed_draws(generator):
            keyed()

    def loaded(workers: int) -> float:
        loader = DataLoader(rows, BATCH_SIZE, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]
        return wall_seconds(lambda: list(loader))

    keyed()
    pairs = [(cpu_seconds(keyed), cpu_seconds(unkeyed)) for _ in range(NUM_REPEATS)]
    ours, theirs = (median(column) for column in zip(*pairs, strict=True))
    ratio = median(a / b for a, b in pairs)
    print(f"keyed    {NUM_ROWS / ours:8.0f} {plural} a CPU second")
    print(f"unkeyed  {NUM_ROWS / theirs:8.0f} {plural} a CPU second   keyed takes {ratio:.2f}x")
    for workers in (0, 2):
        seconds = median(loaded(workers) for _ in range(3))
        print(f"{workers} workers{NUM_ROWS / seconds:8.0f} {plural} a second by the wall")
