"""Two evaluated runs on the same samples and the same masks: paired differences with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.records import RunFolder


@dataclass(frozen=True, eq=False)
class Side:
    """One evaluated run: its samples, and the masks they were drawn with."""

    name: str
    samples: pa.Table
    seed: int | None
    num_passes: int | None
    plan_digest: str | None


@dataclass(frozen=True)
class Difference:
    """A metric of both runs on the same rows, and b - a with its bootstrap interval."""

    metric: str
    a: float
    b: float
    estimate: float
    lower: float
    upper: float
    num_rows: int
    higher_is_better: bool


@dataclass(frozen=True)
class Comparison:
    """What two runs differ in."""

    run_a: str
    run_b: str
    num_rows: int
    confidence_level: float
    metrics: tuple[Difference, ...] = ()
    slices: tuple[Difference, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    """Metrics that cannot be compared, and why."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        raise NotImplementedError


def read_side(run: RunFolder) -> Side:
    """The samples of an evaluated run."""
    raise NotImplementedError


def compare_runs(
    a: Side,
    b: Side,
    *,
    groups: Mapping[str, Sequence[int]] | None = None,
    extra_columns: Path | None = None,
    num_resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare b with a."""
    raise NotImplementedError
