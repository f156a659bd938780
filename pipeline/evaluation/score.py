"""Scoring: rows of production, raw, to scored rows; and the same rows again, to the same bits."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.config.schema import RunConfig
from pipeline.records import RunFolder

Say = Callable[[str], None]


def score(
    run: RunFolder,
    config: RunConfig,
    inputs: Sequence[Path],
    output: Path,
    say: Say = lambda sentence: None,
) -> pa.Table | None:
    """Score files of raw rows, and write the scored rows as parquet.

    Args:
        run: an evaluated run.
        config: its configuration.
        inputs: csv, json lines or parquet, with the text column that the model was trained on.
        output: parquet file to write.
        say: receives the few sentences a user should read.

    Returns:
        The table written; None on all processes but the main one.
    """
    raise NotImplementedError


def rescore(
    run: RunFolder, config: RunConfig, table: pa.Table, places: Sequence[int]
) -> pa.Table | None:
    """Score chosen rows of a scored table once more, in the very batches of the first time.

    Returns:
        The rows at these places, in this order: on the same machine bit for bit what was scored,
        if weights, seed, passes and dropout plan are the same.
    """
    raise NotImplementedError
