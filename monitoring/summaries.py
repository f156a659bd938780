"""What a profile keeps of a column: mergeable counts and sums on grids that no data moves."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from monitoring.exact_sums import ExactSum, FloatArray

UNIT, SIGNED_LOG = "unit", "signed-log"
NUM_UNIT_BINS = 200
STEPS_PER_OCTAVE = 16
OCTAVES = range(-20, 31)  # magnitudes from about 1e-6 to 1e9 are told apart
MAX_CATEGORIES, LONGEST_CATEGORY = 500, 80
OTHER = "(other)"


@dataclass(frozen=True, eq=False)
class NumericSummary:
    """One numeric column: how many values, their exact sum, their ends, their histogram.

    `counts[i]` is the number of values in (edges[i], edges[i + 1]].
    """

    grid: str
    count: int
    """Finite values."""
    missing: int
    """Nulls, NaN and infinities."""
    total: ExactSum
    minimum: float
    """inf where there is no value."""
    maximum: float
    """-inf where there is no value."""
    counts: NDArray[np.int64]

    @property
    def sum(self) -> float:
        """Sum of the finite values."""
        return float(self.total.high)

    @property
    def mean(self) -> float:
        """NaN where there is no value."""
        return self.sum / self.count if self.count else float("nan")

    @property
    def edges(self) -> FloatArray:
        """Ends of the bins, from -inf to inf: one more than there are bins."""
        return grid_edges(self.grid)

    @classmethod
    def of(cls, values: FloatArray, grid: str) -> "NumericSummary":
        """Of the values [N] of a column, NaN where there is none."""
        finite = values[np.isfinite(values)]
        return cls(
            grid=grid,
            count=len(finite),
            missing=len(values) - len(finite),
            total=ExactSum.of(finite.tolist()),
            minimum=float(finite.min(initial=np.inf)),
            maximum=float(finite.max(initial=-np.inf)),
            counts=histogram(finite, grid),
        )

    def __add__(self, other: "NumericSummary") -> "NumericSummary":
        assert self.grid == other.grid, "the grid follows from the name of the column"
        return NumericSummary(
            grid=self.grid,
            count=self.count + other.count,
            missing=self.missing + other.missing,
            total=self.total + other.total,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            counts=self.counts + other.counts,
        )


@cache
def grid_edges(grid: str) -> FloatArray:
    """The ends of a grid's bins, from -inf to inf.

    `unit`: 200 equal bins between 0 and 1. `signed-log`: 16 bins an octave on either side of 0.
    """
    if grid == UNIT:
        inner = np.arange(NUM_UNIT_BINS + 1) / NUM_UNIT_BINS
    else:
        steps = np.arange(OCTAVES.start * STEPS_PER_OCTAVE, OCTAVES[-1] * STEPS_PER_OCTAVE + 1)
        positive = np.exp2(steps / STEPS_PER_OCTAVE)
        inner = np.concatenate([-positive[::-1], [0.0], positive])
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    edges.flags.writeable = False
    return edges


def histogram(values: FloatArray, grid: str) -> NDArray[np.int64]:
    """How many values [N] lie in each bin (edges[i], edges[i + 1]]."""
    edges = grid_edges(grid)
    bins = np.searchsorted(edges, values, side="left") - 1
    return np.bincount(bins, minlength=len(edges) - 1).astype(np.int64)


# -- categories ----------------------------------------------------------------------------------


def category_counts(values: Iterable[str | None]) -> dict[str, int]:
    """Counts by value, at most 500 of them; long ones are no categories, nulls are left out."""
    known = (value for value in values if value is not None)
    return _limited(Counter(v if len(v) <= LONGEST_CATEGORY else OTHER for v in known))


def add_categories(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    """Counts of both."""
    return _limited(Counter(first) + Counter(second))


def _limited(counts: Mapping[str, int]) -> dict[str, int]:
    """Values with the smallest keys; the others are counted as one.

    A value among the smallest of the whole is among the smallest of every part that has it, so
    counts of parts add up to those of the whole.
    """
    named = sorted((name for name in counts if name != OTHER), key=_key)
    kept = {name: counts[name] for name in sorted(named[:MAX_CATEGORIES])}
    rest = counts.get(OTHER, 0) + sum(counts[name] for name in named[MAX_CATEGORIES:])
    return kept | ({OTHER: rest} if rest else {})


def _key(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=16).digest()


# -- calibration ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """Equally wide, right-closed bins of the confidence, over the rows with a label."""

    count: NDArray[np.int64]
    """Rows in each bin, [B]."""
    confidence: ExactSum
    """Sum of their confidences, [B]."""
    correct: NDArray[np.int64]
    """How many of them are predicted correctly, [B]."""

    @classmethod
    def of(
        cls, confidence: FloatArray, correct: NDArray[np.bool_], num_bins: int
    ) -> "CalibrationBins":
        """Of confidences [N] between 0 and 1 and whether the prediction was right, [N]."""
        upper = np.arange(1, num_bins + 1) / num_bins
        bins = np.minimum(np.searchsorted(upper, confidence, side="left"), num_bins - 1)
        sums = [ExactSum.of(confidence[bins == one].tolist()) for one in range(num_bins)]
        return cls(
            count=np.bincount(bins, minlength=num_bins).astype(np.int64),
            confidence=ExactSum(
                np.array([one.high for one in sums]), np.array([one.low for one in sums])
            ),
            correct=np.bincount(bins[correct], minlength=num_bins).astype(np.int64),
        )

    @property
    def error(self) -> float:
        """Expected calibration error, as the evaluation defines it; NaN without labelled rows."""
        gaps = np.abs(self.correct - self.confidence.high).sum()
        return float(gaps / self.count.sum()) if self.count.any() else float("nan")

    def __add__(self, other: "CalibrationBins") -> "CalibrationBins":
        return CalibrationBins(
            self.count + other.count,
            self.confidence + other.confidence,
            self.correct + other.correct,
        )


# -- classes -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ClassSums:
    """Rows and embedding sums by class: the label, or where there is none the prediction."""

    names: tuple[str, ...]
    counts: NDArray[np.int64]  # [C]
    sums: ExactSum  # [C, D]

    def aligned(self, names: tuple[str, ...]) -> "ClassSums":
        """The same with zeros for classes that have no rows here."""
        places = [names.index(name) for name in self.names]
        counts = np.zeros(len(names), dtype=np.int64)
        sums = ExactSum.zeros(len(names), self.sums.high.shape[1])
        counts[places] = self.counts
        sums.high[places], sums.low[places] = self.sums.high, self.sums.low
        return ClassSums(names, counts, sums)

    def __add__(self, other: "ClassSums") -> "ClassSums":
        names = tuple(sorted({*self.names, *other.names}))
        first, second = self.aligned(names), other.aligned(names)
        return ClassSums(names, first.counts + second.counts, first.sums + second.sums)
