"""One row a sample: prediction, uncertainty, every OOD score, and what a replay needs.

Scored rows hold everything; samples.parquet of an evaluation a part of it that stays small.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.schema import RunConfig
from pipeline.evaluation.batches import Batches, batch_keys
from pipeline.evaluation.calibration import apply_temperature
from pipeline.evaluation.judge import ENTROPIES, Prediction, Scores
from pipeline.evaluation.ood.registry import CLASS_SOURCES, SCORES, TOKEN_SOURCES
from pipeline.evaluation.predict_classes import ClassPrediction
from pipeline.evaluation.predict_tokens import TokenPrediction
from pipeline.modality.bundle import LabelNames, Modality, modality_of
from pipeline.modality.images import thumbnail
from pipeline.records import write_bytes

if TYPE_CHECKING:
    from datasets import Dataset

SCORED_SCHEMA = "masklock-scored-v1"
METADATA_KEY = b"masklock"
EXCERPT_CHARACTERS = 500
NUM_THUMBNAILS = 20
COLUMNS = ("sample_id", "batch_key", "embedding")
CLASS_COLUMNS = (
    *("label", "prediction", "correct", "label_log_probability", "disagreement"),
    *("confidence", "deterministic_confidence", "calibrated_confidence"),
)
TOKEN_COLUMNS = ("log_probability", "perplexity", "deterministic_perplexity")
_NOT_IN_SAMPLES = ("batch_key", "input_ids", "label_mask", "image", "audio", "embedding")
_TINY = np.finfo(np.float64).tiny  # stands for a probability of exactly 0: log = -708.4


@dataclass(frozen=True)
class Origin:
    """What scored rows come from, the same for all of them."""

    label_names: LabelNames
    temperature: float | None
    described: Callable[["Dataset"], dict[str, pa.Array]]
    """The columns about a row's input."""


def described_by(config: RunConfig, processor: Any) -> Callable[["Dataset"], dict[str, pa.Array]]:
    """The columns about the input of prepared rows of this task."""
    modality = modality_of(config)
    return lambda rows: modality.described(rows, processor)


def scored_table(
    prediction: Prediction, rows: "Dataset", batches: Batches, scores: Scores, origin: Origin
) -> pa.Table:
    """One row for each prepared row, in their order.

    Args:
        prediction: of these rows.
        rows: prepared.
        batches: places of rows that ran together.
        scores: every OOD score, each [N].
        origin: the model they come from.
    """
    ids = prediction.sample_ids.tolist()
    columns = {
        "sample_id": pa.array(ids, pa.int64()),
        "batch_key": pa.array(batch_keys(ids, batches), pa.int64()),
        **origin.described(rows),
    }
    if isinstance(prediction, ClassPrediction):
        columns |= _class_columns(prediction, origin)
    else:
        columns |= _token_columns(prediction)
    columns |= {name: pa.array(values, pa.float64()) for name, values in scores.items()}
    columns["embedding"] = _lists(prediction.features.numpy())
    return pa.table(columns)


def scored_names(modality: Modality, has_classes: bool) -> set[str]:
    """Columns of scored rows, before there are any."""
    described = modality.described_names
    columns = CLASS_COLUMNS if has_classes else TOKEN_COLUMNS
    sources = CLASS_SOURCES if has_classes else TOKEN_SOURCES
    scores = {name for name, score in SCORES.items() if sources & set(score.sources)}
    return {*COLUMNS, *described, *columns, *ENTROPIES, *scores}


def samples_of(split: str, scored: pa.Table) -> pa.Table:
    """The rows of one split of samples.parquet: `test`, or `ood:<name>`."""
    table = scored.drop_columns([n for n in scored.column_names if _stays_out(scored, n)])
    place = table.column_names.index("text")
    excerpt = pc.utf8_slice_codeunits(table["text"], 0, EXCERPT_CHARACTERS)
    table = table.set_column(place, "text", excerpt)
    if "image" in scored.column_names:
        table = table.append_column("thumbnail", _thumbnails(scored))
    return table.add_column(1, "split", pa.array([split] * len(table), pa.string()))


def _stays_out(scored: pa.Table, name: str) -> bool:
    """What is large, and files of channels, whatever they are called."""
    return name in _NOT_IN_SAMPLES or pa.types.is_struct(scored[name].type)


def _thumbnails(scored: pa.Table) -> pa.Array:
    """Small PNGs of the most uncertain rows, which the report shows; null for all others."""
    entropy = scored["predictive_entropy"].to_numpy()
    order = np.lexsort((scored["sample_id"].to_numpy(), -entropy))[:NUM_THUMBNAILS]
    pictures: list[bytes | None] = [None] * len(scored)
    for place in order.tolist():
        pictures[place] = thumbnail(scored["image"][place].as_py())
    return pa.array(pictures, pa.binary())


def with_carried(scored: pa.Table, carried: pa.Table | None) -> pa.Table:
    """Scored rows beside the user's own columns of the same rows."""
    if carried is not None:
        for name in carried.column_names:
            scored = scored.append_column(name, carried[name])
    return scored


def with_sequences(samples: pa.Table, said: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Samples beside what was generated from some of them; null for the others."""
    by_id = {row["sample_id"]: row for row in said}
    found = [by_id.get(number, {}) for number in samples["sample_id"].to_pylist()]
    for name in (name for name in (said[0] if said else ()) if name != "sample_id"):
        values = [row.get(name) for row in found]
        texts = [v[:EXCERPT_CHARACTERS] if isinstance(v, str) else v for v in values]
        samples = samples.append_column(name, pa.array(texts))
    return samples


def with_metadata(table: pa.Table, about: Mapping[str, Any]) -> pa.Table:
    """The table, saying how it was scored."""
    return table.replace_schema_metadata(
        {METADATA_KEY: json.dumps({"schema": SCORED_SCHEMA, **about})}
    )


def scoring_facts(
    config: RunConfig,
    model_version: str,
    plan_digest: str,
    label_names: LabelNames,
    carried: Sequence[str],
) -> dict[str, Any]:
    """What with the rows decides every number of a scored table."""
    return {
        "run": config.name,
        "task": config.model.task,
        "model_version": model_version,
        "plan_digest": plan_digest,
        "seed": config.seed,
        "num_mc_passes": config.evaluation.num_mc_passes,
        "batch_size": config.evaluation.batch_size,
        "label_names": label_names,
        "carried": list(carried),
    }


def write_table(path: Path, table: pa.Table) -> None:
    """Write parquet, the whole file or nothing."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())


def _class_columns(prediction: ClassPrediction, origin: Origin) -> dict[str, Any]:
    names, passes, labels = origin.label_names, prediction.monte_carlo, prediction.labels.tolist()
    assert names is not None
    assert origin.temperature is not None
    predicted, mean_NC = passes.prediction.tolist(), passes.mean_probabilities.numpy()
    calibrated = apply_temperature(mean_NC, origin.temperature).max(axis=1)
    right = [
        number == label if label >= 0 else None
        for number, label in zip(predicted, labels, strict=True)
    ]
    likely = [
        float(np.log(max(mean_NC[row, label], _TINY))) if label >= 0 else None
        for row, label in enumerate(labels)
    ]
    return {
        "label": pa.array([names[label] if label >= 0 else None for label in labels], pa.string()),
        "prediction": pa.array([names[number] for number in predicted], pa.string()),
        "correct": pa.array(right, pa.bool_()),
        "label_log_probability": pa.array(likely, pa.float64()),
        "confidence": pa.array(passes.confidence.numpy()),
        "deterministic_confidence": pa.array(prediction.plain.confidence.numpy()),
        "calibrated_confidence": pa.array(calibrated),
        **{n: pa.array(getattr(passes, n).numpy()) for n in (*ENTROPIES, "disagreement")},
    }


def _token_columns(prediction: TokenPrediction) -> dict[str, Any]:
    passes = prediction.monte_carlo
    return {
        "num_tokens": pa.array(passes.num_tokens.numpy()),
        "log_probability": pa.array(passes.log_probability.numpy()),
        "perplexity": pa.array(passes.perplexity.numpy()),
        "deterministic_perplexity": pa.array(prediction.plain.perplexity.numpy()),
        **{name: pa.array(getattr(passes, name).numpy()) for name in ENTROPIES},
    }


def _lists(values: np.ndarray) -> pa.Array:
    """[N, D] as N lists."""
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1), pa.float32()))
