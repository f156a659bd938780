"""Local `evaluate` metrics against torchmetrics and plain formulas; no cache, no network."""

import evaluate
import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from pipeline.evaluation.calibration import expected_calibration_error
from pipeline.evaluation.metrics import METRICS, compute_metric

RNG = np.random.default_rng(0)
REFERENCES, PREDICTIONS = RNG.integers(0, 5, 200), RNG.integers(0, 5, 200)


def test_every_metric_is_a_local_evaluate_metric():
    assert set(METRICS) == {"accuracy", "f1", "perplexity", "ece", "wer", "cer"}
    assert all(issubclass(metric, evaluate.Metric) for metric in METRICS.values())


def test_accuracy_and_macro_f1_equal_torchmetrics():
    pair = torch.tensor(PREDICTIONS), torch.tensor(REFERENCES)
    accuracy = multiclass_accuracy(*pair, num_classes=5, average="micro").item()
    f1 = multiclass_f1_score(*pair, num_classes=5, average="macro").item()
    result = compute_metric("accuracy", PREDICTIONS, REFERENCES)
    assert result["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert compute_metric("f1", PREDICTIONS, REFERENCES)["f1"] == pytest.approx(f1, abs=1e-6)


def test_perplexity_counts_every_token_once():
    token_log_probabilities = [[-1.0, -2.0, -0.5], [-3.0]]
    means = [np.mean(tokens) for tokens in token_log_probabilities]
    flat = np.concatenate(token_log_probabilities)
    result = compute_metric("perplexity", [*means, np.nan], [3, 1, 0])  # the last has no tokens
    assert result["perplexity"] == pytest.approx(np.exp(-flat.mean()))
    assert result["loss"] == pytest.approx(-flat.mean())


def test_ece_takes_probabilities():
    p = RNG.dirichlet(np.ones(5), 200)
    expected = expected_calibration_error(p.max(1), p.argmax(1) == REFERENCES, 10)
    assert compute_metric("ece", p, REFERENCES, num_bins=10)["ece"] == pytest.approx(expected)


def test_unknown_names_and_empty_inputs_are_refused():
    with pytest.raises(ValueError, match="no metric named 'auc'; there are accuracy"):
        compute_metric("auc", [1], [1])
    with pytest.raises(ValueError, match="at least one row"):
        compute_metric("f1", [], [])
    with pytest.raises(ValueError, match="at least one token"):
        compute_metric("perplexity", [0.0], [0])
