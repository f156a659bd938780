"""Quality metrics: local `evaluate.Metric` classes over scikit-learn, jiwer. No hub, no network.

Never `evaluate.load(...)`: it downloads a script, and breaks where `import evaluate, datasets`
stand on one line. Use `compute_metric`, on the main process, after gathering, with each sample
once.
"""

from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Sequence, Value
from numpy.typing import ArrayLike
from sklearn.metrics import accuracy_score, f1_score

from pipeline.evaluation.calibration import expected_calibration_error
from pipeline.evaluation.transcripts import character_edits, word_edits

_CLASSES = Features({"predictions": Value("int64"), "references": Value("int64")})
_TEXTS = Features({"predictions": Value("string"), "references": Value("string")})


def _describe(description: str, inputs: str, features: Features) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=inputs, features=features
    )


class Accuracy(evaluate.Metric):
    """{"accuracy"}: the share of predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Share of right predictions.", "Class numbers.", _CLASSES)

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(evaluate.Metric):
    """{"f1"}: the plain mean over classes of 2 P R / (P + R), 0 for a class never predicted right.

    Classes are those that occur among the references or the predictions.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Macro-averaged F1.", "Class numbers.", _CLASSES)

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


class Perplexity(evaluate.Metric):
    """{"perplexity", "loss"}: exp of the mean negative log-probability of all tokens, and it.

    predictions: each sample's mean token log-probability (nats); references: its number of tokens.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Value("float64"), "references": Value("int64")})
        return _describe("Perplexity of a corpus.", "Log-probability, tokens.", features)

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        log_probability = np.asarray(predictions, dtype=np.float64)
        num_tokens = np.asarray(references, dtype=np.int64)
        if num_tokens.sum() == 0:
            raise ValueError("Perplexity needs at least one token; no sample has any.")
        counted = num_tokens > 0  # a sample without tokens has no mean (NaN)
        loss = -np.average(log_probability[counted], weights=num_tokens[counted])
        return {"perplexity": float(np.exp(loss)), "loss": float(loss)}


class CalibrationError(evaluate.Metric):
    """{"ece"}: predictions are class probabilities [N, C], references the classes."""

    def _info(self) -> evaluate.MetricInfo:
        features = Features(
            {"predictions": Sequence(Value("float64")), "references": Value("int64")}
        )
        return _describe("Expected calibration error.", "Probabilities, classes.", features)

    def _compute(
        self, predictions: ArrayLike, references: ArrayLike, num_bins: int = 15
    ) -> dict[str, float]:
        p = np.asarray(predictions, dtype=np.float64)
        correct = p.argmax(axis=1) == np.asarray(references)
        return {"ece": expected_calibration_error(p.max(axis=1), correct, num_bins)}


class WordErrorRate(evaluate.Metric):
    """{"wer"}: word edits of all transcripts over the words of all references (jiwer)."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Word error rate.", "Transcripts.", _TEXTS)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"wer": word_edits(predictions, references).rate}


class CharacterErrorRate(evaluate.Metric):
    """{"cer"}: the same over characters, blanks inside included."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Character error rate.", "Transcripts.", _TEXTS)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"cer": character_edits(predictions, references).rate}


METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "perplexity": Perplexity,
    "ece": CalibrationError,
    "wer": WordErrorRate,
    "cer": CharacterErrorRate,
}


def compute_metric(
    name: str, predictions: ArrayLike, references: ArrayLike, **options: Any
) -> dict[str, float]:
    """One metric of METRICS over all rows, in memory: no cache file is written."""
    if name not in METRICS:
        raise ValueError(f"There is no metric named {name!r}; there are {', '.join(METRICS)}.")
    if len(np.asarray(references)) == 0:
        raise ValueError(f"{name} needs at least one row; got none.")
    make: Callable[..., evaluate.Metric] = METRICS[name]
    result = make(keep_in_memory=True).compute(
        predictions=np.asarray(predictions), references=np.asarray(references), **options
    )
    return dict(result)
