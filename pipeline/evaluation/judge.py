"""From predictions to the report's sections: quality, calibration, uncertainty, OOD.

Pure functions of what `predict.py` returns; nothing is run or written here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import EvaluationConfig, RunConfig
from pipeline.evaluation.batches import Batches
from pipeline.evaluation.calibration import (
    apply_temperature,
    calibration_summary,
    fit_temperature,
    resampled_calibration_errors,
    summarise,
)
from pipeline.evaluation.intervals import mean_interval, percentile_interval
from pipeline.evaluation.metrics import compute_metric
from pipeline.evaluation.ood.comparison import compare_scores
from pipeline.evaluation.ood.registry import FeatureDetector, score_rows
from pipeline.evaluation.predict_classes import ClassPrediction
from pipeline.evaluation.predict_tokens import TokenPrediction
from pipeline.evaluation.ranking import error_auroc
from pipeline.evaluation.token_uncertainty import SampleUncertainty, TokenUncertainty
from pipeline.evaluation.uncertainty import Uncertainty

Prediction = ClassPrediction | TokenPrediction
Scores = dict[str, NDArray[np.float64]]
ENTROPIES = ("predictive_entropy", "expected_entropy", "mutual_information")
_TOP = 5
ECE_CHANGE = "mc_minus_deterministic/ece"


def scores_of(
    prediction: Prediction, detectors: Mapping[str, FeatureDetector], batches: Batches
) -> Scores:
    """Every OOD score of every row, each [N]; higher = more out-of-distribution.

    `batches` are the places of rows that ran together.
    """
    if isinstance(prediction, ClassPrediction):
        sources = {"logits": prediction.logits, "monte_carlo": prediction.monte_carlo}
    else:
        sources = {"tokens": prediction.plain, "monte_carlo_tokens": prediction.monte_carlo}
    return score_rows({**sources, "features": prediction.features}, detectors, batches)


def ood_section(
    inside: Scores, outside: Mapping[str, Scores], config: EvaluationConfig, seed: int
) -> dict[str, Any]:
    """For each named set: every score's figures, which one wins, and whether MC was worth it."""
    return {
        name: compare_scores(
            inside,
            scores,
            set_name=name,
            seed=seed,
            num_resamples=config.num_bootstrap_resamples,
            confidence_level=config.confidence_level,
        )
        for name, scores in outside.items()
    }


def judge(test: Prediction, validation: Prediction, config: RunConfig) -> dict[str, Any]:
    """quality, intervals, calibration and uncertainty, and for classes chance."""
    if isinstance(test, ClassPrediction):
        assert isinstance(validation, ClassPrediction)
        return judge_classes(test, validation, config.evaluation, config.seed)
    return judge_tokens(test, config.evaluation, config.seed)


# -- classification ------------------------------------------------------------------------------


def judge_classes(
    test: ClassPrediction, validation: ClassPrediction, config: EvaluationConfig, seed: int
) -> dict[str, Any]:
    """quality, intervals, chance, calibration and uncertainty of a classifier on its test rows."""
    labels = test.labels.numpy()
    temperature = fit_temperature(
        validation.monte_carlo.mean_probabilities.numpy(), validation.labels.numpy()
    )
    tempered = apply_temperature(test.monte_carlo.mean_probabilities.numpy(), temperature)
    distributions = {
        "deterministic": test.plain.mean_probabilities.numpy(),
        "mc": test.monte_carlo.mean_probabilities.numpy(),
        "mc_temperature": tempered,
    }
    calibration: dict[str, Any] = {"temperature": temperature}
    for name, probabilities in distributions.items():
        calibration[name] = calibration_summary(probabilities, labels, config.num_bins)
    return {
        "quality": {
            name: _class_quality(distributions[name], labels, calibration[name]["nll"])
            for name in ("deterministic", "mc")
        },
        "intervals": _class_intervals(distributions, labels, config, seed),
        "chance": float(np.bincount(labels).max() / len(labels)),
        "calibration": calibration,
        "uncertainty": _class_uncertainty(test.monte_carlo, labels),
    }


def _class_quality(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], loss: float
) -> dict[str, float]:
    predictions = probabilities.argmax(axis=1)
    return {
        **compute_metric("accuracy", predictions, labels),
        **compute_metric("f1", predictions, labels),
        **top_5(probabilities, labels),
        "loss": loss,
    }


def top_5(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
    """Share of rows of which at most four classes are likelier than the label; of 5 it says all."""
    if probabilities.shape[1] <= _TOP:
        return {}
    of_label = np.take_along_axis(probabilities, labels[:, None], axis=1)
    return {"top_5_accuracy": float(((probabilities > of_label).sum(axis=1) < _TOP).mean())}


def _class_intervals(
    distributions: Mapping[str, NDArray[np.float64]],
    labels: NDArray[np.int64],
    config: EvaluationConfig,
    seed: int,
) -> dict[str, list[float]]:
    """Of accuracy, of the calibration error, and of what the passes change in the latter."""
    intervals, errors = {}, {}
    for name, probabilities in distributions.items():
        correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
        confidence = probabilities.max(axis=1)
        accuracy = mean_interval(
            correct,
            seed=seed,
            num_resamples=config.num_bootstrap_resamples,
            confidence_level=config.confidence_level,
        )
        errors[name] = resampled_calibration_errors(
            confidence,
            correct,
            config.num_bins,
            seed=seed,
            num_resamples=config.num_bootstrap_resamples,
        )
        intervals[f"{name}/accuracy"] = list(accuracy)
        intervals[f"{name}/ece"] = list(percentile_interval(errors[name], config.confidence_level))
    change = errors["mc"] - errors["deterministic"]  # on the same resamples
    intervals[ECE_CHANGE] = list(percentile_interval(change, config.confidence_level))
    return intervals


def _class_uncertainty(passes: Uncertainty, labels: NDArray[np.int64]) -> dict[str, Any]:
    correct = passes.prediction.numpy() == labels
    scores = {name: getattr(passes, name).numpy() for name in (*ENTROPIES, "disagreement")}
    confidence = passes.confidence.numpy()
    return {
        "means": {name: float(values.mean()) for name, values in scores.items()},
        "error_auroc": {
            "mc_msp": error_auroc(1 - confidence, correct),
            **{name: error_auroc(values, correct) for name, values in scores.items()},
        },
    }


# -- language models -----------------------------------------------------------------------------


def judge_tokens(test: TokenPrediction, config: EvaluationConfig, seed: int) -> dict[str, Any]:
    """quality, intervals, calibration and uncertainty of a language model, over its tokens."""
    passes = {"deterministic": test.plain, "mc": test.monte_carlo}
    tokens = {"deterministic": test.plain_tokens, "mc": test.monte_carlo_tokens}
    return {
        "quality": {name: _token_quality(samples) for name, samples in passes.items()},
        "intervals": {
            f"{name}/perplexity": _perplexity_interval(samples, config, seed)
            for name, samples in passes.items()
        },
        "calibration": {
            name: _token_calibration(values, config.num_bins) for name, values in tokens.items()
        },
        "uncertainty": {
            "means": {
                name: float(getattr(test.monte_carlo_tokens, name).mean()) for name in ENTROPIES
            },
            "error_auroc": {
                name: error_auroc(
                    getattr(test.monte_carlo_tokens, name).numpy(),
                    test.monte_carlo_tokens.correct.numpy(),
                )
                for name in ENTROPIES
            },
        },
    }


def _token_quality(samples: SampleUncertainty) -> dict[str, float]:
    return compute_metric("perplexity", samples.log_probability.numpy(), samples.num_tokens.numpy())


def _perplexity_interval(
    samples: SampleUncertainty, config: EvaluationConfig, seed: int
) -> list[float]:
    lower, upper = mean_interval(
        samples.log_probability.numpy(),
        weights=samples.num_tokens.numpy(),
        seed=seed,
        num_resamples=config.num_bootstrap_resamples,
        confidence_level=config.confidence_level,
    )
    return [float(np.exp(-upper)), float(np.exp(-lower))]


def _token_calibration(tokens: TokenUncertainty, num_bins: int) -> dict[str, Any]:
    return summarise(
        tokens.confidence.numpy(),
        tokens.correct.numpy(),
        tokens.squared_error.numpy(),
        -tokens.log_probability.numpy(),
        num_bins,
    )
