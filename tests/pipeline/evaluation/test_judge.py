"""Sections of the report from made-up predictions, and what the verdict says of them."""

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from pipeline.config.schema import EvaluationConfig
from pipeline.evaluation.calibration import (
    expected_calibration_error,
    resampled_calibration_errors,
)
from pipeline.evaluation.intervals import make_generator
from pipeline.evaluation.judge import ECE_CHANGE, judge_classes, top_5
from pipeline.evaluation.predict_classes import ClassPrediction
from pipeline.evaluation.uncertainty import MonteCarloSums
from pipeline.evaluation.verdict import verdict

CONFIG = EvaluationConfig(num_bootstrap_resamples=100)


def predicted(labels, scale=3.0, noise=1.0, passes=4):
    """A classifier of three classes that mostly finds the label; passes differ by noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(labels)
    shape = (passes, len(labels), 3)
    truth = torch.nn.functional.one_hot(labels, 3).float()
    stack = scale * truth + noise * torch.randn(shape, generator=generator)
    sums, plain = MonteCarloSums(), MonteCarloSums()
    sums.update(stack)
    plain.update(stack[0])
    ids = torch.arange(len(labels))
    features = torch.zeros(len(labels), 2)
    return ClassPrediction(ids, features, stack[0], labels, plain.result(), sums.result())


def report_of(test, validation, **changes):
    judged = judge_classes(test, validation, CONFIG, seed=1)
    counts = {"test": len(test.labels), "validation": len(validation.labels)}
    return (
        {"num_samples": counts, "mc": {"num_passes": 4, "num_sites": 2}, "ood": {}}
        | judged
        | changes
    )


LABELS = [number % 3 for number in range(60)]


def test_calibration_errors_of_resamples_equal_a_plain_loop():
    random = np.random.default_rng(0)
    confidence, correct = random.uniform(0.3, 1, 80), random.integers(0, 2, 80)
    rows = make_generator(5).integers(80, size=(30, 80))
    expected = [expected_calibration_error(confidence[r], correct[r], 10) for r in rows]
    found = resampled_calibration_errors(confidence, correct, 10, seed=5, num_resamples=30)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("validation", [[0, 1] * 5, [2]], ids=["a class is missing", "one row"])
def test_poor_validation_rows_still_give_a_temperature(validation):
    judged = judge_classes(predicted(LABELS), predicted(validation), CONFIG, seed=1)
    assert 0.05 <= judged["calibration"]["temperature"] <= 20
    assert set(judged["calibration"]) >= {"deterministic", "mc", "mc_temperature"}


def test_without_a_wrong_prediction_there_is_no_error_auroc():
    report = report_of(predicted(LABELS, scale=30), predicted(LABELS))
    assert report["quality"]["mc"]["accuracy"] == 1
    assert set(report["uncertainty"]["error_auroc"].values()) == {None}
    sentences = verdict(report, 0.95)
    assert sentences[-1].startswith("Every test prediction is right, so nothing can be said")


def test_top_5_accuracy_is_that_of_scikit_learn_and_left_out_where_it_says_nothing():
    random = np.random.default_rng(2)
    labels, p = random.integers(8, size=50), random.dirichlet(np.ones(8), size=50)
    expected = top_k_accuracy_score(labels, p, k=5, labels=np.arange(8))
    assert top_5(p, labels) == {"top_5_accuracy": pytest.approx(expected)}
    assert top_5(p[:, :5], labels) == {}


def test_the_verdict_is_plain_words():
    sentences = verdict(report_of(predicted(LABELS, scale=1.0), predicted(LABELS)), 0.95)
    assert [sentence.split(" ", 2)[0] for sentence in sentences] == [
        "Accuracy",
        "Monte-Carlo",
        "With",
        "As",
    ]
    assert "on 60 test rows (95% interval" in sentences[0]
    assert all(sentence.endswith(".") for sentence in sentences)


def test_without_a_live_site_nothing_is_said_of_passes():
    mc = {"num_passes": 1, "num_sites": 0}
    sentences = verdict(report_of(predicted(LABELS), predicted(LABELS), mc=mc), 0.95)
    assert "), in one pass; always" in sentences[0]
    assert sentences[1].startswith("This model has no live dropout site: ")


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ([0.01, 0.08], "make calibration worse"),
        ([-0.08, -0.01], "make calibration better"),
        ([-0.02, 0.03], "do not clearly change calibration"),
    ],
)
def test_calibration_is_called_worse_or_better_only_where_the_interval_says_so(interval, words):
    report = report_of(predicted(LABELS), predicted(LABELS))
    report["intervals"][ECE_CHANGE] = interval
    assert f"Monte-Carlo passes {words}: " in verdict(report, 0.95)[1]


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ([0.5, 0.7], "would give 40.0%."),
        ([0.3, 0.5], "would give 40.0%, which is not clearly worse."),
        ([0.1, 0.2], "would give 40.0%, which is better."),
    ],
)
def test_an_accuracy_no_better_than_guessing_is_said(interval, words):
    report = report_of(predicted(LABELS), predicted(LABELS), chance=0.4)
    report["intervals"]["mc/accuracy"] = interval
    assert verdict(report, 0.95)[0].endswith(words)


def test_a_temperature_at_the_end_of_its_search_is_said():
    report = report_of(predicted(LABELS), predicted([0, 1, 2], noise=0.3))
    assert report["calibration"]["temperature"] == pytest.approx(0.05)
    assert "fitted on 3 validation rows" in verdict(report, 0.95)[2]
    assert verdict(report, 0.95)[2].endswith("too few or too alike to fit one.")


def test_the_change_of_calibration_is_taken_on_the_same_resamples():
    same = predicted(LABELS, noise=1.0, passes=1)
    report = report_of(same, same)
    assert report["intervals"][ECE_CHANGE] == [0, 0]
