"""How well a score separates two sets: AUROC, AUPR both ways, FPR at 95 % TPR; bootstraps.

Convention throughout, as in OpenOOD (since 1.5) and pytorch-ood: a *higher* score means more
out-of-distribution, and out-of-distribution is the positive class. `inside` are the scores of the
N in-distribution rows, `outside` those of the M others. The same serves "does uncertainty find the
errors?": inside = right.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score

from pipeline.evaluation.intervals import FloatArray, count_blocks, make_generator

TRUE_POSITIVE_RATE = 0.95


@dataclass(frozen=True)
class Separation:
    """The three figures, between 0 and 1."""

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95: float


class RankedScores:
    """Both sets sorted once, so that each figure of a resample is a few cumulative sums.

    A resample is given as weights: how often each row of `inside` [R, N] and `outside` [R, M]
    counts.
    """

    def __init__(self, inside: ArrayLike, outside: ArrayLike) -> None:
        inside, outside = _checked(inside, "inside"), _checked(outside, "outside")
        self._inside_order = np.argsort(inside)
        self._outside_order = np.argsort(outside)
        sorted_inside, sorted_outside = inside[self._inside_order], outside[self._outside_order]
        # For each outside row: how many inside rows lie strictly below it, how many not above it.
        self._below = np.searchsorted(sorted_inside, sorted_outside, side="left")
        self._not_above = np.searchsorted(sorted_inside, sorted_outside, side="right")

    def figures(
        self, inside_weights: FloatArray, outside_weights: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """(AUROC, FPR95) of each resample, [R] and [R]. Weights of a row sum to N and M."""
        weights = outside_weights[:, self._outside_order]
        cumulative = self._inside_cumulative(inside_weights)
        below = np.take(cumulative, self._below, axis=1)
        total = cumulative[:, -1]
        mean_rank = (below + np.take(cumulative, self._not_above, axis=1)) / 2
        auroc = np.einsum("rm,rm->r", weights, mean_rank) / (total * weights.sum(axis=1))
        threshold = self._threshold_index(weights)[:, None]
        fpr95 = 1 - np.take_along_axis(below, threshold, axis=1)[:, 0] / total
        return auroc, fpr95

    def _inside_cumulative(self, inside_weights: FloatArray) -> FloatArray:
        cumulative = np.zeros((len(inside_weights), inside_weights.shape[1] + 1))
        np.cumsum(inside_weights[:, self._inside_order], axis=1, out=cumulative[:, 1:])
        return cumulative

    def _threshold_index(self, weights: FloatArray) -> NDArray[np.int64]:
        """The outside row at which 95 % of the outside weight, counted from the top, is reached."""
        from_top = np.cumsum(weights[:, ::-1], axis=1)
        wanted = np.ceil(TRUE_POSITIVE_RATE * from_top[:, -1:])
        return weights.shape[1] - 1 - np.argmax(from_top >= wanted, axis=1)


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """P(outside > inside) + P(outside = inside) / 2: Mann-Whitney, exact under ties."""
    return _point_figures(inside, outside)[0]


def fpr_at_95_tpr(inside: ArrayLike, outside: ArrayLike) -> float:
    """Share of in-distribution rows flagged by the highest threshold that flags 95 % of the others.

    Flagged means score >= threshold. Equals scikit-learn's `roc_curve(drop_intermediate=False)`
    at its first point with TPR >= 0.95.
    """
    return _point_figures(inside, outside)[1]


def separation(inside: ArrayLike, outside: ArrayLike) -> Separation:
    """All figures of one score.

    AUPR is average precision, sum_k (R_k - R_{k-1}) P_k. OpenOOD joins the points by straight
    lines instead, which is optimistic (Davis & Goadrich, ICML 2006): a score with few distinct
    values, such as disagreement, would gain by its ties. `aupr_out`: out-of-distribution is
    positive, the score as it is; `aupr_in`: in-distribution is positive, the score negated.
    """
    area, fpr95 = _point_figures(inside, outside)
    inside, outside = np.asarray(inside, np.float64), np.asarray(outside, np.float64)
    rank = np.unique(np.concatenate([inside, outside]), return_inverse=True)[1]
    is_out = np.arange(len(rank)) >= len(inside)
    return Separation(
        auroc=area,
        aupr_in=float(average_precision_score(~is_out, -rank)),
        aupr_out=float(average_precision_score(is_out, rank)),
        fpr95=fpr95,
    )


def error_auroc(score: ArrayLike, correct: ArrayLike) -> float | None:
    """AUROC of a score as a detector of wrong predictions; None when all or none are wrong."""
    score, correct = np.asarray(score, np.float64), np.asarray(correct, dtype=bool)
    if score.shape != correct.shape:
        raise ValueError(f"One score a prediction: got {score.shape} scores, {correct.shape} rows.")
    if correct.all() or not correct.any():
        return None
    return auroc(score[correct], score[~correct])


def bootstrap_figures(
    inside: Mapping[str, ArrayLike],
    outside: Mapping[str, ArrayLike],
    *,
    seed: int,
    num_resamples: int = 1000,
) -> dict[str, tuple[FloatArray, FloatArray]]:
    """(AUROC, FPR95) of every score on the same resamples, [R] and [R]: differences are paired.

    Stratified: each resample draws N inside rows and M outside rows with replacement.
    """
    ranked = {name: RankedScores(inside[name], outside[name]) for name in inside}
    num_inside, num_outside = (_common_length(scores) for scores in (inside, outside))
    parts: dict[str, list[tuple[FloatArray, FloatArray]]] = {name: [] for name in ranked}
    for weights in _paired_blocks(seed, num_inside, num_outside, num_resamples):
        for name, scores in ranked.items():
            parts[name].append(scores.figures(*weights))
    return {
        name: (np.concatenate([a for a, _ in blocks]), np.concatenate([f for _, f in blocks]))
        for name, blocks in parts.items()
    }


def _paired_blocks(
    seed: int, num_inside: int, num_outside: int, num_resamples: int
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Weights of both sets in blocks of 50 resamples: a few MiB that stay in the cache."""
    generators = make_generator(seed, 1), make_generator(seed, 2)
    for start in range(0, num_resamples, 50):
        size = min(50, num_resamples - start)
        inside = np.concatenate(list(count_blocks(generators[0], num_inside, size)))
        yield inside, np.concatenate(list(count_blocks(generators[1], num_outside, size)))


def _point_figures(inside: ArrayLike, outside: ArrayLike) -> tuple[float, float]:
    ranked = RankedScores(inside, outside)
    ones = (np.ones((1, np.size(inside))), np.ones((1, np.size(outside))))
    area, fpr95 = ranked.figures(*ones)
    return float(area[0]), float(fpr95[0])


def _checked(scores: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} needs one score a row, at least one row; got {array.shape}.")
    if np.isnan(array).any():
        raise ValueError(f"{int(np.isnan(array).sum())} of {len(array)} {name} scores are NaN.")
    return array


def _common_length(scores: Mapping[str, ArrayLike]) -> int:
    lengths = {name: np.size(values) for name, values in scores.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"Scores compared with each other are of the same rows; got {lengths}.")
    return next(iter(lengths.values()))
