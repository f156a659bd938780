"""Bounds on the reference's mean: how often they fail, and scores against crepes and MAPIE."""

import numpy as np
import pytest
from crepes.base import p_values_batch
from mapie.exchangeability_testing.bounds import hoeffding_bound
from scipy.stats import beta

from monitoring.bounds import SCORES, rank_score, tail_score, upper_mean_bound, value_score
from pipeline.errors import DataError

DRAWS = {
    "beta": (lambda random, size: random.beta(1, 8, size), 1 / 9),
    "rare ones": (lambda random, size: (random.random(size) < 0.03).astype(float), 0.03),
    "constant": (lambda random, size: np.full(size, 0.4), 0.4),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_the_upper_bound_fails_at_most_as_often_as_said(draw):
    sample, mean = DRAWS[draw]
    random = np.random.default_rng(1)
    failures = sum(upper_mean_bound(sample(random, 200), error=0.1) < mean for _ in range(300))
    assert failures <= 0.1 * 300 + 3 * np.sqrt(0.09 * 300)


def test_the_bound_is_the_mean_whose_capital_is_one_over_the_error():
    x = np.random.default_rng(2).beta(1, 8, 500)
    bound = upper_mean_bound(x, error=0.05)
    total, squares, variance, log_capital = 0.5, 0.25, 0.25, 0.0
    for i, value in enumerate(x, start=1):
        bet = min(np.sqrt(2 * np.log(20) / (500 * variance)), 0.75)
        log_capital += np.log(1 + bet * (bound - value))
        total += value
        squares += (value - total / (i + 1)) ** 2
        variance = squares / (i + 1)
    assert log_capital == pytest.approx(np.log(20))


def test_the_bound_is_closer_than_hoeffdings_where_the_score_varies_little():
    x = np.random.default_rng(3).beta(1, 8, 2000)
    margin = upper_mean_bound(x, error=0.01) - x.mean()
    assert 0 < margin < 0.5 * (hoeffding_bound(x, 0.01) - x.mean())


def test_ranks_are_the_p_values_of_crepes_turned_round():
    random = np.random.default_rng(4)
    reference, window = random.normal(size=200), random.normal(size=50)
    p_values = p_values_batch(reference, window, smoothing=False)
    ranks = rank_score(reference).of(window)
    np.testing.assert_allclose(ranks, 1 - (p_values * 201 - 1) / 200)


def test_ties_count_half():
    assert rank_score([1.0, 2.0, 2.0, 3.0]).of([2.0, 0.0, 9.0]).tolist() == [0.5, 0.0, 1.0]


@pytest.mark.parametrize("kind", ["rank", "tail"])
@pytest.mark.parametrize("ties", [False, True])
def test_bounds_from_ranks_fail_at_most_as_often_as_said(kind, ties):
    random = np.random.default_rng(5)
    population = random.integers(0, 12, 20_000) if ties else random.normal(size=20_000)
    failures = []
    for _ in range(200):
        score = SCORES[kind](random.choice(population, 100), error=0.1)
        mean = score.of(population).mean()
        failures.append([mean > score.upper, mean < score.lower])
    too_high, too_low = np.mean(failures, axis=0)
    limit = 0.1 + 3 * np.sqrt(0.09 / 200)
    assert too_high <= limit
    assert too_low <= limit or (ties and kind == "tail")


def test_the_tail_has_the_distribution_of_an_order_statistic():
    reference = np.arange(1.0, 101.0)
    score = tail_score(reference, error=0.05, tail=0.05)
    assert score.of([95.0, 95.5, 101.0]).tolist() == [0.0, 1.0, 1.0]
    assert score.upper == pytest.approx(beta(6, 95).ppf(0.95))


def test_a_value_is_bounded_on_both_sides():
    x = np.random.default_rng(6).beta(8, 1, 500)
    score = value_score(x)
    assert score.lower < x.mean() < score.upper
    assert score.of(x[:3]).tolist() == x[:3].tolist()


@pytest.mark.parametrize(
    ("reference", "message"),
    [([0.5, 2.0], "between 0 and 1"), ([], "at least one row"), ([0.5, np.nan], "NaN")],
)
def test_what_cannot_be_bounded_is_refused(reference, message):
    with pytest.raises(DataError, match=message):
        value_score(reference)


def test_a_single_row_bounds_nothing():
    for kind, make in SCORES.items():
        score = make([0.5])
        assert 0 <= score.lower <= score.upper <= 1, kind
        assert score.upper > 0.9, kind
