"""Bootstrap intervals against scipy's bootstrap, a plain loop, and their promised coverage."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from pipeline.evaluation.intervals import (
    PairedDifference,
    make_generator,
    mean_interval,
    paired_difference,
    percentile_interval,
)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).exponential(size=300)


def test_the_mean_interval_agrees_with_scipy(values):
    reference = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)
    ).confidence_interval
    result = mean_interval(values, seed=1, num_resamples=4000)
    np.testing.assert_allclose(result, reference, atol=0.01)


def test_the_mean_interval_equals_a_plain_loop_over_the_same_draws(values):
    rows = make_generator(9).integers(len(values), size=(200, len(values)))
    means = [values[drawn].mean() for drawn in rows]
    result = mean_interval(values, seed=9, num_resamples=200)
    np.testing.assert_allclose(result, np.quantile(means, [0.025, 0.975]), atol=1e-12)


def test_weights_resample_a_ratio_of_sums(values):
    weights = np.random.default_rng(2).integers(1, 50, len(values))
    rows = make_generator(9).integers(len(values), size=(200, len(values)))
    ratios = [np.average(values[drawn], weights=weights[drawn]) for drawn in rows]
    result = mean_interval(values, weights=weights, seed=9, num_resamples=200)
    np.testing.assert_allclose(result, np.quantile(ratios, [0.025, 0.975]), atol=1e-12)


def test_the_interval_is_a_function_of_the_seed_alone(values):
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)
    assert mean_interval(values, seed=2**64 - 1) != mean_interval(values, seed=0)


def test_the_draws_do_not_depend_on_the_block_size(values, monkeypatch):
    whole = mean_interval(values, seed=3)
    monkeypatch.setattr("pipeline.evaluation.intervals._BLOCK_ELEMENTS", 1000)
    np.testing.assert_allclose(mean_interval(values, seed=3), whole, atol=1e-12)


def test_95_percent_intervals_hold_the_mean_about_95_percent_of_the_time():
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(300):
        lower, upper = mean_interval(rng.normal(size=60), seed=seed, num_resamples=200)
        hits += lower <= 0 <= upper
    assert 0.89 <= hits / 300 <= 0.98


def test_one_row_has_a_point_for_an_interval():
    assert mean_interval([0.25], seed=0) == (0.25, 0.25)


def test_pairing_sees_a_small_difference_that_separate_intervals_hide():
    rng = np.random.default_rng(6)
    b = rng.normal(0, 10, 400)
    a = b + rng.normal(0.1, 0.3, 400)
    result = paired_difference(a, b, seed=0)
    assert result.outcome == "beats"
    assert paired_difference(b, a, seed=0).outcome == "loses"
    assert result.estimate == pytest.approx((a - b).mean())
    assert mean_interval(a, seed=0)[0] < mean_interval(b, seed=0)[1]


def test_equal_rows_tie():
    assert paired_difference([1.0, 2.0], [1.0, 2.0], seed=0) == PairedDifference(0.0, 0.0, 0.0)
    assert PairedDifference(0.0, 0.0, 0.0).outcome == "ties"


def test_percentiles_hold_the_level_asked_for():
    np.testing.assert_allclose(percentile_interval(np.arange(101), 0.9), (5, 95))
    with pytest.raises(ValueError, match=r"between 0 and 1; got 95"):
        percentile_interval([1.0], 95)


@pytest.mark.parametrize(
    ("values", "message"), [([], "at least one"), ([[1.0]], "shape"), ([np.nan], "NaN")]
)
def test_values_without_a_mean_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(values, seed=0)


def test_rows_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="a has 2 rows but b has 1"):
        paired_difference([1.0, 2.0], [1.0], seed=0)
