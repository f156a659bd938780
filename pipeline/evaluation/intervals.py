"""Bootstrap intervals by the percentile method, seeded: of means and of paired differences.

Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. The rows are resampled
with replacement; the interval runs between the (1-c)/2 and (1+c)/2 quantiles of the resampled
statistic.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Outcome = Literal["beats", "ties", "loses"]
_BLOCK_ELEMENTS = 2**20


@dataclass(frozen=True)
class PairedDifference:
    """mean(a) - mean(b) over the same rows, with its bootstrap interval."""

    estimate: float
    lower: float
    upper: float

    @property
    def outcome(self) -> Outcome:
        """`beats` when the whole interval is above 0, `loses` when it is below, else `ties`."""
        if self.lower > 0:
            return "beats"
        return "loses" if self.upper < 0 else "ties"


def make_generator(seed: int, stream: int = 0) -> np.random.Generator:
    """The generator of every bootstrap here; `stream` gives one seed several independent draws."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream))))


def draw_blocks(
    generator: np.random.Generator, num_rows: int, num_resamples: int
) -> Iterator[NDArray[np.int64]]:
    """Row numbers drawn with replacement, [block, num_rows], `num_resamples` in all.

    The block's size follows from `num_rows` alone, so the numbers drawn do not depend on memory.
    """
    block = max(1, _BLOCK_ELEMENTS // num_rows)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        yield generator.integers(num_rows, size=(size, num_rows))


def count_blocks(
    generator: np.random.Generator, num_rows: int, num_resamples: int
) -> Iterator[FloatArray]:
    """How often each row was drawn, [block, num_rows]: a resample as weights."""
    for rows in draw_blocks(generator, num_rows, num_resamples):
        flat = (rows + num_rows * np.arange(len(rows))[:, None]).ravel()
        counts = np.bincount(flat, minlength=rows.size)
        yield counts.reshape(rows.shape).astype(np.float64)


def percentile_interval(
    resampled: ArrayLike, confidence_level: float = 0.95
) -> tuple[float, float]:
    """The central interval that holds `confidence_level` of the resampled values."""
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level is between 0 and 1; got {confidence_level}.")
    tail = (1 - confidence_level) / 2
    lower, upper = np.quantile(np.asarray(resampled, dtype=np.float64), [tail, 1 - tail])
    return float(lower), float(upper)


def mean_interval(
    values: ArrayLike,
    *,
    seed: int,
    weights: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence_level: float = 0.95,
) -> tuple[float, float]:
    """Interval of sum(weights * values) / sum(weights) over rows; without weights, of the mean.

    Accuracy: values = correct (0 or 1). Perplexity: exp(-lower), exp(-upper), exchanged, of the
    mean token log-probability with weights = tokens a sample; percentile intervals allow it.
    """
    values = _vector(values, "values")
    weights = np.ones_like(values) if weights is None else _vector(weights, "weights")
    _same_length(values, weights, "values", "weights")
    resampled = _resampled_means(values * weights, weights, seed, num_resamples)
    return percentile_interval(resampled, confidence_level)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int,
    num_resamples: int = 1000,
    confidence_level: float = 0.95,
) -> PairedDifference:
    """mean(a) - mean(b), where a[i] and b[i] belong to row i and are resampled together."""
    a, b = _vector(a, "a"), _vector(b, "b")
    _same_length(a, b, "a", "b")
    difference = a - b
    resampled = _resampled_means(difference, np.ones_like(a), seed, num_resamples)
    return PairedDifference(
        float(difference.mean()), *percentile_interval(resampled, confidence_level)
    )


def _resampled_means(
    numerators: FloatArray, denominators: FloatArray, seed: int, num_resamples: int
) -> FloatArray:
    parts = np.stack([numerators, denominators], axis=1)
    blocks = count_blocks(make_generator(seed), len(parts), num_resamples)
    sums = np.concatenate([counts @ parts for counts in blocks])
    return sums[:, 0] / sums[:, 1]


def _vector(values: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} is one number a row, at least one; got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite numbers; leave those rows out first.")
    return array


def _same_length(a: FloatArray, b: FloatArray, name_a: str, name_b: str) -> None:
    if len(a) != len(b):
        raise ValueError(f"{name_a} has {len(a)} rows but {name_b} has {len(b)}; they are paired.")
