"""Quality of a window: oracles, plain references, and intervals that hold what they should."""

import numpy as np
import pytest
from mapie.metrics.calibration import top_label_ece
from scipy import stats
from sklearn.metrics import log_loss

from monitoring.drift import performance

NUM_BINS = 15


def rows(random, n, shift=0.0):
    """Calibrated confidences and whether they are right; `shift` makes them wrong more often."""
    confidence = random.beta(5, 1.5, n)
    return confidence, random.random(n) < confidence - shift


def bins(confidence, correct):
    places = performance.bin_of(confidence, NUM_BINS)
    hits = np.bincount(places, weights=correct, minlength=NUM_BINS).astype(int)
    return np.bincount(places, minlength=NUM_BINS), hits


def test_accuracy_has_wilsons_interval_and_fishers_p_value():
    found = performance.accuracy(np.arange(50) < 40, (450, 500), level=0.95)
    z = stats.norm.ppf(0.975)
    centre = (0.8 + z**2 / 100) / (1 + z**2 / 50)
    margin = z / (1 + z**2 / 50) * np.sqrt(0.8 * 0.2 / 50 + z**2 / (4 * 50**2))
    assert (found.lower, found.upper) == pytest.approx((centre - margin, centre + margin))
    assert (found.estimate, found.reference) == (0.8, 0.9)
    assert found.p_value == pytest.approx(stats.fisher_exact([[40, 10], [450, 50]]).pvalue)


def test_the_calibration_error_is_the_evaluations_and_mapies():
    random = np.random.default_rng(1)
    confidence, correct = rows(random, 500, shift=0.2)
    found = performance.calibration_error(
        confidence, correct, 0.01, num_bins=NUM_BINS, level=0.95, seed=0
    )
    places = np.ceil(confidence * NUM_BINS)
    gaps = [abs((correct[places == one] - confidence[places == one]).sum()) for one in set(places)]
    assert found.estimate == pytest.approx(sum(gaps) / 500)
    assert found.lower < found.estimate < found.upper
    # MAPIE averages over classes of the prediction and has a bin less between its edges
    mapies = top_label_ece(correct.astype(int), confidence, np.ones(500, dtype=int), NUM_BINS + 1)
    assert found.estimate == pytest.approx(mapies, abs=1e-6)


def test_the_likelihood_is_that_of_scikit_learn():
    probability = np.random.default_rng(2).random(100)
    found = performance.negative_log_likelihood(np.log(probability), 0.5, level=0.95)
    assert found.estimate == pytest.approx(
        log_loss(np.ones(100), np.stack([1 - probability, probability], axis=1), labels=[0, 1])
    )
    expected = stats.ttest_1samp(-np.log(probability), 0).confidence_interval(0.95)
    assert (found.lower, found.upper) == pytest.approx(tuple(expected))


def test_the_shift_of_calibration_in_one_bin_is_the_difference_of_two_shares():
    confidence, correct = np.full(60, 0.9), np.arange(60) < 40
    counts, hits = np.zeros(NUM_BINS, dtype=int), np.zeros(NUM_BINS, dtype=int)
    counts[13], hits[13] = 300, 270
    found = performance.calibration_shift(confidence, correct, counts, hits, level=0.95)
    table = [[40, 20], [270, 30]]
    statistic = stats.chi2_contingency(table, correction=False).statistic * 359 / 360
    assert found.estimate == pytest.approx(40 / 60 - 0.9)
    assert found.p_value == pytest.approx(stats.chi2.sf(statistic, 1))


def test_other_confidences_are_no_shift_but_confidences_that_lie_are():
    random = np.random.default_rng(3)
    counts, hits = bins(*rows(random, 5000))
    less_sure = random.beta(2, 2, 1000)
    right = random.random(1000) < less_sure
    found = performance.calibration_shift(less_sure, right, counts, hits, level=0.95)
    assert found.p_value > 0.01
    assert found.lower < 0 < found.upper
    found = performance.calibration_shift(*rows(random, 1000, shift=0.1), counts, hits, level=0.95)
    assert found.p_value < 1e-4
    assert found.lower < -0.1 < found.upper


def test_p_values_of_the_shift_are_uniform_without_one():
    random = np.random.default_rng(4)
    p_values = np.array(
        [
            performance.calibration_shift(
                *rows(random, 150), *bins(*rows(random, 600)), level=0.95
            ).p_value
            for _ in range(400)
        ]
    )
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_the_estimate_on_the_reference_is_nearly_its_accuracy():
    confidence, correct = rows(np.random.default_rng(5), 2000, shift=0.1)
    found = performance.estimated_accuracy(confidence, *bins(confidence, correct), level=0.95)
    assert found.estimate == pytest.approx(correct.mean(), abs=2e-3)
    assert found.reference == pytest.approx(correct.mean())


def test_the_interval_of_the_estimate_holds_the_accuracy_of_another_mix_of_confidences():
    random, inside = np.random.default_rng(6), 0
    for _ in range(300):
        counts, hits = bins(*rows(random, 500))
        confidence = random.beta(3, 1.5, 200)
        found = performance.estimated_accuracy(confidence, counts, hits, level=0.95)
        inside += found.lower <= np.mean(random.random(200) < confidence) <= found.upper
    assert 0.91 * 300 <= inside


def test_one_row_and_an_empty_reference_have_answers():
    nothing = np.zeros(NUM_BINS, dtype=int)
    one, right = np.array([0.7]), np.array([True])
    assert performance.estimated_accuracy(one, nothing, nothing, 0.95) is None
    assert performance.calibration_shift(one, right, nothing, nothing, 0.95) is None
    assert performance.accuracy(right, (0, 0), 0.95).reference is None
    assert performance.negative_log_likelihood(one, None, 0.95).lower == -0.7
