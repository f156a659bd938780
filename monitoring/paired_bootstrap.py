"""Bootstrap of paired differences: both models are judged on the same resampled rows.

A resample is a row of weights, how often each row of the data counts (Efron & Tibshirani, "An
Introduction to the Bootstrap", 1993). A statistic takes weights [R, N] (and, where a second set of
rows plays a part, [R, M]) and gives [R] numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Weights = Mapping[str, FloatArray]
Statistic = Callable[[Weights], FloatArray]
_BLOCK_ELEMENTS = 2**21


@dataclass(frozen=True)
class Interval:
    """A statistic of a and of b on all rows, and b - a with its interval."""

    a: float
    b: float
    lower: float
    upper: float

    @property
    def estimate(self) -> float:
        """b - a."""
        return self.b - self.a


def mean_of(rows: str, values: FloatArray, per_row: FloatArray | None = None) -> Statistic:
    """Mean of values [N], each row counting `per_row` [N] (tokens, or membership of a slice).

    Args:
        rows: name of the set of rows that the values belong to.
    """
    denominator = np.ones_like(values) if per_row is None else per_row
    parts = np.stack([values * denominator, denominator], axis=1)

    def statistic(weights: Weights) -> FloatArray:
        sums = weights[rows] @ parts
        return np.asarray(sums[:, 0] / sums[:, 1])

    return statistic


def exp_of_mean(rows: str, values: FloatArray, per_row: FloatArray) -> Statistic:
    """exp of the weighted mean: perplexity, of -log p and tokens a row."""
    mean = mean_of(rows, values, per_row)
    return lambda weights: np.exp(mean(weights))


def calibration_error_of(
    rows: str, confidence: FloatArray, correct: FloatArray, num_bins: int = 15
) -> Statistic:
    """ECE over equally wide, right-closed bins (Guo et al., ICML 2017)."""
    edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    bins = np.digitize(confidence, edges, right=True)
    gaps = np.zeros((len(confidence), num_bins))
    gaps[np.arange(len(confidence)), bins] = correct - confidence

    def statistic(weights: Weights) -> FloatArray:
        drawn = weights[rows]
        return np.asarray(np.abs(drawn @ gaps).sum(axis=1) / drawn.sum(axis=1))

    return statistic


def auroc_of(rows: tuple[str, str], inside: FloatArray, outside: FloatArray) -> Statistic:
    """P(score of an outside row > score of an inside row), ties half."""
    inside_rows, outside_rows = rows
    order = np.argsort(inside)
    below = np.searchsorted(inside[order], outside, side="left")
    not_above = np.searchsorted(inside[order], outside, side="right")

    def statistic(weights: Weights) -> FloatArray:
        drawn, others = weights[inside_rows][:, order], weights[outside_rows]
        cumulative = np.pad(np.cumsum(drawn, axis=1), ((0, 0), (1, 0)))
        rank = (cumulative[:, below] + cumulative[:, not_above]) / 2
        return np.asarray((rank * others).sum(axis=1) / (cumulative[:, -1] * others.sum(axis=1)))

    return statistic


def resampled(
    pairs: Mapping[str, tuple[Statistic, Statistic]],
    sizes: Mapping[str, int],
    num_resamples: int,
    seed: int,
) -> dict[str, FloatArray]:
    """Statistics of a and of b by name, [1 + R, 2]: of all rows first, then of each resample.

    Args:
        pairs: statistic of a, statistic of b.
        sizes: rows of each set of rows by name; each is resampled by itself.
    """
    found: dict[str, list[FloatArray]] = {name: [] for name in pairs}
    for weights in _weights(sizes, num_resamples, seed):
        for name, (of_a, of_b) in pairs.items():
            found[name].append(np.stack([of_a(weights), of_b(weights)], axis=1))
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def percentile_interval(values: FloatArray, confidence_level: float) -> Interval:
    """The central interval of b - a over the resamples of [1 + R, 2]."""
    difference, tail = values[1:, 1] - values[1:, 0], (1 - confidence_level) / 2
    lower, upper = np.quantile(difference, [tail, 1 - tail])
    return Interval(float(values[0, 0]), float(values[0, 1]), float(lower), float(upper))


def simultaneous_intervals(
    values: Mapping[str, FloatArray], confidence_level: float
) -> dict[str, Interval]:
    """Intervals of b - a that hold all at once with this confidence.

    Every interval is estimate +- c times its standard error, c the quantile of the largest
    studentised deviation of a resample (Westfall & Young, "Resampling-Based Multiple Testing",
    1993).
    """
    if not values:
        return {}
    stacked = np.stack(list(values.values()))
    difference = stacked[:, :, 1] - stacked[:, :, 0]
    deviation = difference[:, 1:] - difference[:, :1]
    error = deviation.std(axis=1)
    moving = error > 1e-12
    half = np.zeros(len(error))
    if moving.any():
        largest = np.abs(deviation[moving] / error[moving, None]).max(axis=0)
        half = float(np.quantile(largest, confidence_level)) * error
    return {
        name: Interval(float(rows[0, 0]), float(rows[0, 1]), float(d - h), float(d + h))
        for (name, rows), d, h in zip(values.items(), difference[:, 0], half, strict=True)
    }


def _weights(sizes: Mapping[str, int], num_resamples: int, seed: int) -> Iterator[Weights]:
    """Every row once; then resamples in blocks whose size follows from the rows alone."""
    yield {name: np.ones((1, size)) for name, size in sizes.items()}
    streams = {
        name: np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, place))))
        for place, name in enumerate(sizes)
    }
    block = max(1, _BLOCK_ELEMENTS // max(sizes.values()))
    for start in range(0, num_resamples, block):
        num = min(block, num_resamples - start)
        yield {name: _counts(streams[name], size, num) for name, size in sizes.items()}


def _counts(generator: np.random.Generator, size: int, num: int) -> FloatArray:
    rows = generator.integers(size, size=(num, size)) + size * np.arange(num)[:, None]
    counts = np.bincount(rows.ravel(), minlength=num * size)
    return counts.reshape(num, size).astype(np.float64)
