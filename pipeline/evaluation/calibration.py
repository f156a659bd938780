"""Calibration: do predicted probabilities match how often the prediction is right?

Arrays in, numbers out (float64). N rows, C classes; `confidence` is the probability of the
prediction. Language models come in through `summarise`: tokens are the rows, and no [N, C] array
is needed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from pipeline.evaluation.intervals import FloatArray, count_blocks, make_generator

NUM_BINS = 15
TEMPERATURE_BOUNDS = (0.05, 20.0)
_TINY = np.finfo(np.float64).tiny  # stands for a probability of exactly 0: log = -708.4


def expected_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS
) -> float:
    """ECE = sum_b (n_b / N) |accuracy_b - confidence_b| over equally wide, right-closed bins.

    Bin b is (b/B, (b+1)/B], as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017
    (github.com/gpleiss/temperature_scaling); a confidence of exactly 0 joins the first bin.
    """
    confidence, correct = _checked(confidence, correct, num_bins)
    return _binned_error(confidence, correct, _equal_width_bins(confidence, num_bins))


def equal_mass_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS
) -> float:
    """The same sum over bins of (nearly) equally many rows, cut along the sorted confidences.

    Nguyen & O'Connor, EMNLP 2015; "adaptive calibration error" in Nixon et al., CVPRW 2019. Equal
    confidences share a bin, so the order of the rows cannot matter; with N < B each row has its
    own.
    """
    confidence, correct = _checked(confidence, correct, num_bins)
    rank = np.searchsorted(np.sort(confidence), confidence, side="left")
    return _binned_error(confidence, correct, rank * num_bins // len(confidence))


def resampled_calibration_errors(
    confidence: ArrayLike,
    correct: ArrayLike,
    num_bins: int = NUM_BINS,
    *,
    seed: int,
    num_resamples: int = 1000,
) -> FloatArray:
    """`expected_calibration_error` of bootstrap resamples, [R]; one seed, the same resamples."""
    confidence, correct = _checked(confidence, correct, num_bins)
    rows = np.arange(len(confidence))
    gaps_NB = np.zeros((len(rows), num_bins))
    gaps_NB[rows, _equal_width_bins(confidence, num_bins)] = correct - confidence
    blocks = count_blocks(make_generator(seed), len(rows), num_resamples)
    sums_RB = np.concatenate([counts_RN @ gaps_NB for counts_RN in blocks])
    return np.asarray(np.abs(sums_RB).sum(axis=1) / len(rows))


def reliability_curve(
    confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS
) -> list[dict[str, Any]]:
    """The bins of `expected_calibration_error`, from low to high.

    Each is {"lower", "upper", "count", "confidence", "accuracy"}, the last two None in an empty
    bin.
    """
    confidence, correct = _checked(confidence, correct, num_bins)
    count, confidences, hits = _bin_sums(
        confidence, correct, _equal_width_bins(confidence, num_bins), num_bins
    )
    return [
        {
            "lower": i / num_bins,
            "upper": (i + 1) / num_bins,
            "count": int(n),
            "confidence": float(confidences[i] / n) if n else None,
            "accuracy": float(hits[i] / n) if n else None,
        }
        for i, n in enumerate(count)
    ]


def squared_errors(probabilities: ArrayLike, labels: ArrayLike) -> FloatArray:
    """Each row's sum_c (p_c - [c = label])^2, [N]; the mean over rows is the Brier score.

    The multi-class sum form of Brier 1950, between 0 and 2: with two classes twice the binary form.
    """
    probabilities, labels = _distributions(probabilities, labels)
    target = probabilities[np.arange(len(labels)), labels]
    return np.square(probabilities).sum(axis=1) - 2 * target + 1


def negative_log_likelihoods(probabilities: ArrayLike, labels: ArrayLike) -> FloatArray:
    """Each row's -log p(label) in nats, [N]; a probability of exactly 0 counts as 2.2e-308."""
    probabilities, labels = _distributions(probabilities, labels)
    return -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], _TINY))


def calibration_summary(
    probabilities: ArrayLike, labels: ArrayLike, num_bins: int = NUM_BINS
) -> dict[str, Any]:
    """Everything the report says about one set of probabilities [N, C] and labels [N]."""
    p, y = _distributions(probabilities, labels)
    errors, likelihoods = squared_errors(p, y), negative_log_likelihoods(p, y)
    return summarise(p.max(axis=1), p.argmax(axis=1) == y, errors, likelihoods, num_bins)


def summarise(
    confidence: ArrayLike,
    correct: ArrayLike,
    squared_error: ArrayLike,
    negative_log_likelihood: ArrayLike,
    num_bins: int = NUM_BINS,
) -> dict[str, Any]:
    """The same from one number a row, all [N].

    {"ece", "ece_equal_mass", "brier", "nll", "reliability"}, as the report holds them.
    """
    return {
        "ece": expected_calibration_error(confidence, correct, num_bins),
        "ece_equal_mass": equal_mass_calibration_error(confidence, correct, num_bins),
        "brier": float(np.mean(np.asarray(squared_error, dtype=np.float64))),
        "nll": float(np.mean(np.asarray(negative_log_likelihood, dtype=np.float64))),
        "reliability": reliability_curve(confidence, correct, num_bins),
    }


def fit_temperature(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The T that minimises the NLL of softmax(log p / T), by a bounded search over log T.

    Guo et al. 2017, section 4.2. For Monte-Carlo dropout p is the *mean* over passes: scaling each
    pass and averaging afterwards is another model, under-confident by construction. Fit on
    validation rows. T = 0.05 or 20, the ends of the search, says that the rows were too few or all
    right (all wrong): no better temperature exists for them. T = 1 where nothing improves.
    """
    probabilities, labels = _distributions(probabilities, labels)
    scores = np.log(np.maximum(probabilities, _TINY))
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return -float(log_softmax(scores * np.exp(-log_temperature), axis=1)[rows, labels].mean())

    found = minimize_scalar(
        loss, bounds=np.log(TEMPERATURE_BOUNDS), method="bounded", options={"xatol": 1e-6}
    )
    # The first of equals: where all rows are right, the loss rounds to 0 before the search's end.
    candidates: Mapping[float, float] = {
        0.0: loss(0.0),
        **{float(end): loss(float(end)) for end in np.log(TEMPERATURE_BOUNDS)},
        float(found.x): float(found.fun),
    }
    return float(np.exp(min(candidates, key=lambda log_t: candidates[log_t])))


def apply_temperature(probabilities: ArrayLike, temperature: float) -> FloatArray:
    """softmax(log p / T), [N, C]: predictions stay, confidences move (T > 1: down)."""
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"A temperature is a positive number; got {temperature}.")
    p = np.asarray(probabilities, dtype=np.float64)
    return np.asarray(softmax(np.log(np.maximum(p, _TINY)) / temperature, axis=-1))


def _equal_width_bins(confidence: FloatArray, num_bins: int) -> NDArray[np.int64]:
    upper_edges = np.arange(1, num_bins + 1) / num_bins
    return np.minimum(np.searchsorted(upper_edges, confidence, side="left"), num_bins - 1)


def _bin_sums(
    confidence: FloatArray, correct: FloatArray, bins: NDArray[np.int64], num_bins: int
) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
    count = np.bincount(bins, minlength=num_bins).astype(np.int64)
    confidences, hits = (
        np.bincount(bins, weights=values, minlength=num_bins).astype(np.float64)
        for values in (confidence, correct)
    )
    return count, confidences, hits


def _binned_error(confidence: FloatArray, correct: FloatArray, bins: NDArray[np.int64]) -> float:
    # |hits - confidences| / N is (n_b / N) |accuracy - confidence|, without dividing by empty bins
    _, confidences, hits = _bin_sums(confidence, correct, bins, 0)
    return float(np.abs(hits - confidences).sum() / len(confidence))


def _checked(
    confidence: ArrayLike, correct: ArrayLike, num_bins: int
) -> tuple[FloatArray, FloatArray]:
    if num_bins < 1:
        raise ValueError(f"A calibration error needs at least one bin; got num_bins={num_bins}.")
    confidence = np.asarray(confidence, dtype=np.float64)
    correct = np.asarray(correct, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or len(confidence) == 0:
        raise ValueError(
            "confidence and correct are one number a row, at least one row; got shapes "
            f"{confidence.shape} and {correct.shape}."
        )
    if not ((confidence >= -1e-6) & (confidence <= 1 + 1e-6)).all():  # a NaN fails too
        raise ValueError("Confidences lie between 0 and 1; some do not, or are NaN.")
    if not np.isin(correct, (0.0, 1.0)).all():
        raise ValueError("correct is 0 or 1 (or a boolean) for each row; other values were found.")
    return np.clip(confidence, 0, 1), correct


def _distributions(
    probabilities: ArrayLike, labels: ArrayLike
) -> tuple[FloatArray, NDArray[np.int64]]:
    p = np.asarray(probabilities, dtype=np.float64)
    y = np.asarray(labels)
    if p.ndim != 2 or y.shape != p.shape[:1] or p.size == 0:
        raise ValueError(
            "Probabilities have shape [N, C] and labels [N], with N and C at least 1; got "
            f"{p.shape} and {y.shape}."
        )
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"Labels are integers from 0 to {p.shape[1] - 1}; others were found.")
    sums = p.sum(axis=1)
    if not ((p >= 0).all() and np.allclose(sums, 1, atol=1e-4)):
        worst = int(np.argmax(np.abs(np.nan_to_num(sums, nan=np.inf) - 1)))
        raise ValueError(
            "Each row of probabilities is >= 0 and sums to 1 (these are not logits); "
            f"row {worst} sums to {sums[worst]:.6g}."
        )
    return p, y.astype(np.int64)
