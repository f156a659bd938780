"""How well the model does in a window: measured where labels are known, estimated where not.

Rows of the reference come in as equally wide, right-closed bins of the confidence: `counts` [B],
`correct` [B] (rows predicted correctly), over the whole reference. NumPy arrays in, `Estimate` out.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import isotonic_regression

from monitoring.drift.result import Estimate

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_NUM_RESAMPLES = 500


def bin_of(confidence: FloatArray, num_bins: int) -> IntArray:
    """The bin (b / B, (b + 1) / B] of each confidence [N]; 0 belongs to the first."""
    upper_edges = np.arange(1, num_bins + 1) / num_bins
    return np.minimum(np.searchsorted(upper_edges, confidence, side="left"), num_bins - 1)


def accuracy(correct: NDArray[np.bool_], reference: tuple[int, int], level: float) -> Estimate:
    """Share of correct rows [N] with Wilson's interval, against (correct, all) of the reference.

    The p-value is Fisher's exact test of equal shares.
    """
    num_correct, n = int(correct.sum()), len(correct)
    interval = stats.binomtest(num_correct, n).proportion_ci(level, method="wilson")
    reference_correct, reference_rows = reference
    table = [
        [num_correct, n - num_correct],
        [reference_correct, reference_rows - reference_correct],
    ]
    return Estimate(
        num_correct / n,
        float(interval.low),
        float(interval.high),
        reference_correct / reference_rows if reference_rows else None,
        float(stats.fisher_exact(table).pvalue) if reference_rows else None,
    )


def calibration_error(
    confidence: FloatArray,
    correct: NDArray[np.bool_],
    reference: float | None,
    *,
    num_bins: int,
    level: float,
    seed: int,
) -> Estimate:
    """ECE = sum_b |sum over bin b of (correct - confidence)| / N, with its bootstrap interval.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. Resampling adds noise to
    every bin, so the interval is the basic one, reflected about the estimate and cut at 0.
    """
    bins, gaps = bin_of(confidence, num_bins), correct - confidence

    def error(rows: IntArray) -> float:
        sums = np.bincount(bins[rows], weights=gaps[rows], minlength=num_bins)
        return float(np.abs(sums).sum() / len(rows))

    n = len(gaps)
    generator = np.random.Generator(np.random.Philox(seed))
    resampled = [error(generator.integers(n, size=n)) for _ in range(_NUM_RESAMPLES)]
    estimate = error(np.arange(n))
    high, low = np.quantile(resampled, [(1 + level) / 2, (1 - level) / 2])
    lower, upper = max(0.0, 2 * estimate - float(high)), 2 * estimate - float(low)
    return Estimate(estimate, min(lower, estimate), max(upper, estimate), reference)


def negative_log_likelihood(
    log_probability: FloatArray, reference: float | None, level: float
) -> Estimate:
    """Mean of -log p(label) [N] in nats, with Student's interval; one row has no interval."""
    losses = -log_probability
    mean, n = float(losses.mean()), len(losses)
    margin = 0.0
    if n > 1:
        margin = float(stats.t.ppf((1 + level) / 2, n - 1) * losses.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - margin, mean + margin, reference)


def calibration_shift(
    confidence: FloatArray,
    correct: NDArray[np.bool_],
    counts: IntArray,
    reference_correct: IntArray,
    level: float,
) -> Estimate | None:
    """Accuracy of the window minus that of the reference *at equal confidence*, over all bins.

    The Mantel-Haenszel risk difference sum_b w_b (a_b - r_b) / sum_b w_b with w_b = n_b m_b / (n_b
    + m_b), and the Cochran-Mantel-Haenszel test that it is 0 (Cochran, Biometrics 1954). Not 0:
    confidences no longer mean what they meant. None where no bin has rows of both.
    """
    bins = bin_of(confidence, len(counts))
    n = np.bincount(bins, minlength=len(counts))
    hits = np.bincount(bins, weights=correct.astype(np.float64), minlength=len(counts))
    both = (n > 0) & (counts > 0)
    if not both.any():
        return None
    n, hits, m, reference_hits = n[both], hits[both], counts[both], reference_correct[both]
    weights = n * m / (n + m)
    accuracies, references = hits / n, reference_hits / m
    pooled = (hits + reference_hits) / (n + m)
    difference = float((weights * (accuracies - references)).sum() / weights.sum())
    under_null = (weights * pooled * (1 - pooled) * (n + m) / (n + m - 1)).sum()
    statistic = (weights.sum() * difference) ** 2 / under_null if under_null > 0 else 0.0
    spread = weights**2 * (_variances(hits, n) / n + _variances(reference_hits, m) / m)
    margin = stats.norm.ppf((1 + level) / 2) * np.sqrt(spread.sum()) / weights.sum()
    lower, upper = difference - float(margin), difference + float(margin)
    return Estimate(difference, lower, upper, 0.0, float(stats.chi2.sf(statistic, 1)))


def estimated_accuracy(
    confidence: FloatArray, counts: IntArray, reference_correct: IntArray, level: float
) -> Estimate | None:
    """Accuracy without labels: the mean of calibrated confidences, as NannyML's CBPE.

    "Confidence-based performance estimation" (nannyml.readthedocs.io, "How it works"): right as
    long as a confidence still means what it meant in the reference, whatever the mix of
    confidences; a change of that meaning needs labels. A bin's calibrated confidence is the
    accuracy there of the reference, with one row more that is right as often as the middle of the
    bin says, made monotone by isotonic regression: on the reference itself the estimate is nearly
    the accuracy. The interval holds the sampling of the window's rows (Poisson-binomial) and of the
    reference's bins; it is cut at 0 and 1. None without a reference.
    """
    if not counts.any():
        return None
    middles, rows = (np.arange(len(counts)) + 0.5) / len(counts), counts + 1
    accuracies = isotonic_regression((reference_correct + middles) / rows, weights=rows).x
    n = np.bincount(bin_of(confidence, len(counts)), minlength=len(counts))
    total = n.sum()
    estimate = float((n * accuracies).sum() / total)
    variances = _variances(accuracies * rows, rows)
    variance = (n * variances).sum() / total**2
    variance += ((n / total) ** 2 * variances / rows).sum()
    margin = float(stats.norm.ppf((1 + level) / 2) * np.sqrt(variance))
    reference = float(reference_correct.sum() / counts.sum())
    return Estimate(estimate, max(0.0, estimate - margin), min(1.0, estimate + margin), reference)


def _variances(hits: NDArray[Any], rows: IntArray) -> FloatArray:
    """Of one row's success, by Laplace's rule: a few rows that are all right claim no certainty."""
    smoothed = (hits + 1) / (rows + 2)
    return np.asarray(smoothed * (1 - smoothed), dtype=np.float64)


def known(*columns: ArrayLike) -> list[FloatArray]:
    """The rows in which every column [N] has a finite value."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    kept = np.all([np.isfinite(array) for array in arrays], axis=0)
    return [array[kept] for array in arrays]
