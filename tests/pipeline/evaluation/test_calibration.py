"""Calibration against scikit-learn, torchmetrics, scipy, and loops that spell the sums out."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from pipeline.evaluation import calibration
from pipeline.evaluation.calibration import (
    apply_temperature,
    calibration_summary,
    equal_mass_calibration_error,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihoods,
    reliability_curve,
    squared_errors,
)

N, C = 500, 6


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    p = rng.dirichlet(np.full(C, 0.3), size=N)
    labels = np.array([rng.choice(C, p=row) for row in p**0.5 / (p**0.5).sum(1, keepdims=True)])
    return p, labels


def loop_ece(confidence, correct, num_bins) -> float:
    total = 0.0
    for i in range(num_bins):
        lower, upper = i / num_bins, (i + 1) / num_bins
        members = [k for k, c in enumerate(confidence) if lower < c <= upper or (c == 0 and i == 0)]
        if members:
            gap = np.mean([correct[k] for k in members]) - np.mean([confidence[k] for k in members])
            total += len(members) / len(confidence) * abs(gap)
    return total


@pytest.mark.parametrize("num_bins", [1, 10, 15, 1000])
def test_ece_equals_a_loop_over_right_closed_bins(rows, num_bins):
    p, labels = rows
    confidence, correct = p.max(1), p.argmax(1) == labels
    expected = loop_ece(confidence, correct, num_bins)
    assert expected_calibration_error(confidence, correct, num_bins) == pytest.approx(expected)


def test_ece_equals_torchmetrics(rows):
    p, labels = rows
    expected = multiclass_calibration_error(
        torch.tensor(p), torch.tensor(labels), num_classes=C, n_bins=15
    )
    result = expected_calibration_error(p.max(1), p.argmax(1) == labels)
    assert result == pytest.approx(expected.item(), abs=1e-6)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    edges = np.arange(16) / 15
    bins = reliability_curve(edges, np.ones(16))
    assert [b["count"] for b in bins] == [2] + [1] * 14  # exactly 0 joins the first bin
    assert bins[2]["confidence"] == edges[3]


def test_confidences_of_exactly_zero_and_one_are_counted():
    assert expected_calibration_error([0.0, 1.0], [0, 1]) == 0
    assert expected_calibration_error([0.0, 1.0], [1, 0]) == 1


def test_the_reliability_curve_adds_up_to_the_ece(rows):
    p, labels = rows
    confidence, correct = p.max(1), p.argmax(1) == labels
    bins = [b for b in reliability_curve(confidence, correct) if b["count"]]
    total = sum(b["count"] / N * abs(b["accuracy"] - b["confidence"]) for b in bins)
    assert total == pytest.approx(expected_calibration_error(confidence, correct))


def test_empty_bins_hold_none():
    bins = reliability_curve([0.95], [True])
    assert bins[-1] == {
        "lower": 14 / 15,
        "upper": 1.0,
        "count": 1,
        "confidence": 0.95,
        "accuracy": 1.0,
    }
    assert bins[0]["confidence"] is None
    assert bins[0]["accuracy"] is None


def test_equal_mass_bins_of_distinct_confidences_are_slices_of_the_sorted_rows(rows):
    p, labels = rows
    confidence, correct = p.max(1), (p.argmax(1) == labels).astype(float)
    order = np.argsort(confidence)
    starts = [-(-i * N // 15) for i in range(16)]  # row k is in bin floor(15 k / N)
    parts = [order[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    gaps = [len(i) / N * abs(correct[i].mean() - confidence[i].mean()) for i in parts]
    result = equal_mass_calibration_error(confidence, correct)
    assert result == pytest.approx(sum(gaps), abs=1e-12)


def test_equal_mass_error_with_ties_does_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    confidence, correct = rng.integers(5, 9, 100) / 10, rng.integers(0, 2, 100)
    order = rng.permutation(100)
    a = equal_mass_calibration_error(confidence, correct)
    b = equal_mass_calibration_error(confidence[order], correct[order])
    assert a == pytest.approx(b, abs=1e-12)


def test_equal_confidences_share_the_bin_of_the_first_of_them():
    result = equal_mass_calibration_error([0.5, 0.5, 0.5, 0.9], [1, 0, 0, 1], num_bins=2)
    assert result == pytest.approx(3 / 4 * (0.5 - 1 / 3) + 1 / 4 * (1 - 0.9))
    reordered = equal_mass_calibration_error([0.9, 0.5, 0.5, 0.5], [0, 1, 1, 1], num_bins=2)
    assert reordered == pytest.approx(3 / 4 * 0.5 + 1 / 4 * 0.9)


@pytest.mark.parametrize("error", [expected_calibration_error, equal_mass_calibration_error])
def test_one_row_and_fewer_rows_than_bins_work(error):
    assert error([0.7], [True]) == pytest.approx(0.3)
    assert error([0.7, 0.9], [True, False]) == pytest.approx((0.3 + 0.9) / 2)


def test_brier_and_nll_equal_scikit_learn(rows):
    p, labels = rows
    brier = brier_score_loss(labels, p, labels=range(C), scale_by_half=False)
    assert squared_errors(p, labels).mean() == pytest.approx(brier)
    nll = log_loss(labels, p, labels=range(C))
    assert negative_log_likelihoods(p, labels).mean() == pytest.approx(nll)


def test_the_brier_score_is_the_sum_form_between_zero_and_two():
    certain = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert squared_errors(certain, [0, 1]).tolist() == [0.0, 2.0]


def test_a_probability_of_zero_for_the_label_costs_a_finite_amount():
    assert negative_log_likelihoods([[1.0, 0.0]], [1])[0] == pytest.approx(708.4, abs=0.01)


def test_the_temperature_is_the_minimum_that_scipy_finds_by_another_method(rows):
    p, labels = rows
    z = np.log(p)
    reference = minimize_scalar(lambda b: -log_softmax(b * z, axis=1)[range(N), labels].mean())
    assert fit_temperature(p, labels) == pytest.approx(1 / reference.x, rel=1e-4)


def test_temperature_finds_the_factor_by_which_logits_were_inflated():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), size=20_000)
    labels = (p.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    assert fit_temperature(apply_temperature(p, 1 / 2.5), labels) == pytest.approx(2.5, rel=0.05)


def test_scaling_lowers_nll_and_keeps_predictions(rows):
    p, labels = rows
    scaled = apply_temperature(p, fit_temperature(p, labels))
    assert np.array_equal(scaled.argmax(1), p.argmax(1))
    np.testing.assert_allclose(scaled.sum(1), 1)
    before, after = (negative_log_likelihoods(q, labels).mean() for q in (p, scaled))
    assert after < before


def test_temperature_one_changes_nothing_and_zero_probabilities_stay_zero():
    p = np.array([[0.5, 0.5, 0.0], [0.2, 0.7, 0.1]])
    np.testing.assert_allclose(apply_temperature(p, 1.0), p, atol=1e-15)
    assert apply_temperature(p, 2.0)[0, 2] == pytest.approx(0, abs=1e-100)


def test_rows_that_are_all_right_or_all_wrong_run_into_an_end_of_the_search():
    p = np.array([[0.7, 0.3]])
    lowest, highest = calibration.TEMPERATURE_BOUNDS
    assert fit_temperature(p, [0]) == pytest.approx(lowest)
    assert fit_temperature(p, [1]) == pytest.approx(highest)


def test_uniform_probabilities_need_no_temperature():
    assert fit_temperature(np.full((4, 2), 0.5), [0, 1, 1, 1]) == pytest.approx(1.0)


def test_the_summary_does_not_depend_on_the_order_of_rows(rows):
    p, labels = rows
    order = np.random.default_rng(2).permutation(N)
    a, b = calibration_summary(p, labels), calibration_summary(p[order], labels[order])
    assert list(a) == ["ece", "ece_equal_mass", "brier", "nll", "reliability"]
    for name in ("ece", "ece_equal_mass", "brier", "nll"):
        assert a[name] == pytest.approx(b[name], abs=1e-12)


def test_tensors_are_welcome(rows):
    p, labels = (torch.tensor(a) for a in rows)
    assert calibration_summary(p, labels)["ece"] == calibration_summary(*rows)["ece"]


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "at least one row"),
        ([0.5], [1, 0], "shapes"),
        ([1.5], [1], "between 0 and 1"),
        ([np.nan], [1], "NaN"),
        ([0.5], [2], "0 or 1"),
    ],
)
def test_bad_confidences_are_refused(confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(confidence, correct)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[2.0, -1.0]], [0], "not logits"),
        ([[0.5, 0.4]], [0], "sums to 0.9"),
        ([[np.nan, 0.4]], [0], "not logits"),
        ([[0.5, 0.5]], [2], "from 0 to 1"),
        ([[0.5, 0.5]], [0.5], "integers"),
        ([[0.5, 0.5]], [0, 1], "got"),
        (np.zeros((0, 2)), np.zeros(0, int), "at least 1"),
    ],
)
def test_bad_probabilities_or_labels_are_refused(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(probabilities, labels)


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.inf, np.nan])
def test_a_temperature_that_is_no_positive_number_is_refused(temperature):
    with pytest.raises(ValueError, match="positive"):
        apply_temperature([[0.5, 0.5]], temperature)


def test_zero_bins_are_refused():
    with pytest.raises(ValueError, match="num_bins=0"):
        reliability_curve([0.5], [1], num_bins=0)
