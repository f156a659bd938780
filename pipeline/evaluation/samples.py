"""The samples table: one row a sample, with its prediction, uncertainty and every OOD score."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.evaluation.judge import ENTROPIES, Prediction, Scores
from pipeline.evaluation.predict import ClassPrediction, TokenPrediction
from pipeline.modality.bundle import LabelNames

if TYPE_CHECKING:
    from datasets import Dataset

EXCERPT_CHARACTERS = 500


def samples_table(
    split: str, prediction: Prediction, rows: "Dataset", scores: Scores, label_names: LabelNames
) -> pa.Table:
    """The rows of one split: `test`, or `ood:<name>`."""
    columns: dict[str, Any] = {
        "sample_id": prediction.sample_ids.tolist(),
        "split": [split] * len(prediction.sample_ids),
        "text": [text[:EXCERPT_CHARACTERS] for text in rows["text"][:]],
    }
    if isinstance(prediction, ClassPrediction):
        assert label_names is not None
        columns |= _class_columns(prediction, label_names)
    else:
        columns |= _token_columns(prediction)
    return pa.table(columns | scores)


def joined(tables: list[pa.Table]) -> pa.Table:
    """All splits; a split without labels has columns of nulls, which take the others' types."""
    return pa.concat_tables(tables, promote_options="default")


def _class_columns(prediction: ClassPrediction, names: tuple[str, ...]) -> dict[str, Any]:
    passes, labels = prediction.monte_carlo, prediction.labels.tolist()
    predicted = passes.prediction.tolist()
    return {
        "label": [names[label] if label >= 0 else None for label in labels],
        "prediction": [names[number] for number in predicted],
        "correct": [
            number == label if label >= 0 else None
            for number, label in zip(predicted, labels, strict=True)
        ],
        "confidence": passes.confidence.tolist(),
        "deterministic_confidence": prediction.plain.confidence.tolist(),
        **{name: getattr(passes, name).tolist() for name in (*ENTROPIES, "disagreement")},
    }


def _token_columns(prediction: TokenPrediction) -> dict[str, Any]:
    passes = prediction.monte_carlo
    return {
        "num_tokens": passes.num_tokens.tolist(),
        "log_probability": passes.log_probability.tolist(),
        "perplexity": passes.perplexity.tolist(),
        "deterministic_perplexity": prediction.plain.perplexity.tolist(),
        **{name: getattr(passes, name).tolist() for name in ENTROPIES},
    }
