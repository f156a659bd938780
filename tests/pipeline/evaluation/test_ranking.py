"""Separation figures against scikit-learn, torchmetrics and loops over all pairs; ties included."""

import time

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score, roc_curve
from torchmetrics.functional.classification import binary_average_precision

from pipeline.evaluation.ranking import (
    RankedScores,
    auroc,
    bootstrap_figures,
    error_auroc,
    fpr_at_95_tpr,
    separation,
)


def two_sets(ties: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inside, outside = rng.normal(0, 1, 203), rng.normal(1, 1.5, 87)
    return (np.round(inside), np.round(outside)) if ties else (inside, outside)


def labelled(inside, outside) -> tuple[np.ndarray, np.ndarray]:
    is_out = np.r_[np.zeros(len(inside), int), np.ones(len(outside), int)]
    return is_out, np.r_[inside, outside]


both = pytest.mark.parametrize("ties", [False, True])


@both
def test_auroc_equals_the_count_over_all_pairs_scikit_learn_and_mann_whitney(ties):
    inside, outside = two_sets(ties)
    wins = [(o > i) + 0.5 * (o == i) for o in outside for i in inside]
    assert auroc(inside, outside) == pytest.approx(np.mean(wins), abs=1e-14)
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(*labelled(inside, outside)))
    statistic = mannwhitneyu(outside, inside).statistic / len(inside) / len(outside)
    assert auroc(inside, outside) == pytest.approx(statistic)


@both
def test_fpr95_is_the_least_false_positive_rate_among_thresholds_that_flag_95_percent(ties):
    inside, outside = two_sets(ties)
    rates = [np.mean(inside >= t) for t in np.r_[inside, outside] if np.mean(outside >= t) >= 0.95]
    assert fpr_at_95_tpr(inside, outside) == pytest.approx(min(rates), abs=1e-14)
    fpr, tpr, _ = roc_curve(*labelled(inside, outside), drop_intermediate=False)
    assert fpr_at_95_tpr(inside, outside) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


@pytest.mark.parametrize("num_outside", [1, 19, 20, 21, 40, 60, 100])
def test_fpr95_counts_exactly_95_percent(num_outside):
    outside, inside = np.arange(num_outside, dtype=float), np.arange(num_outside) - 0.5
    fpr, tpr, _ = roc_curve(*labelled(inside, outside), drop_intermediate=False)
    assert fpr_at_95_tpr(inside, outside) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


@both
def test_aupr_both_ways_equals_torchmetrics(ties):
    inside, outside = two_sets(ties)
    is_out, scores = (torch.tensor(a) for a in labelled(inside, outside))
    unit = (scores - scores.min()) / (scores.max() - scores.min())  # it applies a sigmoid otherwise
    result = separation(inside, outside)
    assert result.aupr_out == pytest.approx(binary_average_precision(unit, is_out).item(), abs=1e-6)
    assert result.aupr_in == pytest.approx(
        binary_average_precision(1 - unit, 1 - is_out).item(), abs=1e-6
    )


def test_a_constant_score_is_worth_chance_in_every_figure():
    result = separation(np.zeros(30), np.zeros(10))
    assert (result.auroc, result.fpr95) == (0.5, 1.0)
    assert (result.aupr_in, result.aupr_out) == (0.75, 0.25)


def test_a_perfect_and_a_reversed_score_take_the_extremes():
    perfect, reversed_ = separation([0, 1], [2, 3]), separation([2, 3], [0, 1])
    assert (perfect.auroc, perfect.aupr_in, perfect.aupr_out, perfect.fpr95) == (1, 1, 1, 0)
    assert (reversed_.auroc, reversed_.fpr95) == (0, 1)


@both
def test_order_of_rows_and_monotone_maps_change_nothing(ties):
    inside, outside = two_sets(ties)
    rng = np.random.default_rng(1)
    shuffled = separation(rng.permutation(inside), rng.permutation(outside))
    assert shuffled == separation(inside, outside)
    assert separation(np.exp(inside), np.exp(outside)) == separation(inside, outside)


def test_infinite_scores_rank_beyond_all_others():
    assert auroc([0.0, -np.inf], [np.inf, 1.0]) == 1


@both
def test_a_weighted_resample_equals_the_figures_of_the_repeated_rows(ties):
    inside, outside = two_sets(ties)
    rng = np.random.default_rng(2)
    weights = [rng.multinomial(len(s), np.full(len(s), 1 / len(s)), 5) for s in (inside, outside)]
    areas, rates = RankedScores(inside, outside).figures(*(w.astype(float) for w in weights))
    for r in range(5):
        drawn = np.repeat(inside, weights[0][r]), np.repeat(outside, weights[1][r])
        assert areas[r] == pytest.approx(roc_auc_score(*labelled(*drawn)), abs=1e-12)
        fpr, tpr, _ = roc_curve(*labelled(*drawn), drop_intermediate=False)
        assert rates[r] == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)


def test_bootstrap_is_seeded_and_gives_equal_scores_equal_resamples():
    inside, outside = two_sets(False)
    a = bootstrap_figures({"x": inside, "y": inside}, {"x": outside, "y": outside}, seed=7)
    b = bootstrap_figures({"x": inside}, {"x": outside}, seed=7)
    c = bootstrap_figures({"x": inside}, {"x": outside}, seed=8)
    assert np.array_equal(a["x"][0], a["y"][0])
    assert np.array_equal(a["x"][1], b["x"][1])
    assert not np.array_equal(b["x"][0], c["x"][0])


def test_bootstrap_spread_matches_the_standard_error_of_hanley_and_mcneil():
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(0, 1, 400), rng.normal(1, 1, 300)
    areas, _ = bootstrap_figures({"x": inside}, {"x": outside}, seed=1)["x"]
    a = auroc(inside, outside)
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = a * (1 - a) + 299 * (q1 - a * a) + 399 * (q2 - a * a)
    assert areas.std() == pytest.approx(np.sqrt(variance / (400 * 300)), rel=0.15)


def test_a_thousand_resamples_of_ten_scores_over_5500_rows_take_under_ten_cpu_seconds():
    rng = np.random.default_rng(4)
    inside = {str(i): rng.normal(size=4500) for i in range(10)}
    outside = {str(i): rng.normal(size=1000) for i in range(10)}
    start = time.process_time()
    bootstrap_figures(inside, outside, seed=0, num_resamples=250)
    assert 4 * (time.process_time() - start) < 10


def test_error_auroc_ranks_wrong_predictions_above_right_ones():
    assert error_auroc([0.1, 0.9, 0.2, 0.8], [True, False, True, False]) == 1
    assert error_auroc([0.1, 0.9], [True, True]) is None
    assert error_auroc([0.1, 0.9], [False, False]) is None
    with pytest.raises(ValueError, match="One score a prediction"):
        error_auroc([0.1], [True, False])


def test_nan_empty_and_unequal_sets_are_refused():
    with pytest.raises(ValueError, match="1 of 2 outside scores are NaN"):
        auroc([0.0], [np.nan, 1.0])
    with pytest.raises(ValueError, match="at least one row"):
        auroc([], [1.0])
    with pytest.raises(ValueError, match="same rows"):
        bootstrap_figures({"a": [1.0], "b": [1.0, 2.0]}, {"a": [1.0], "b": [1.0]}, seed=0)
