"""Columns of scored rows: what they are called, and how they become arrays."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

METADATA_KEY = b"masklock"
SAMPLE_ID, BATCH_KEY, TEXT, INPUT_IDS = "sample_id", "batch_key", "text", "input_ids"
LABEL, PREDICTION, CORRECT, CONFIDENCE = "label", "prediction", "correct", "confidence"
EMBEDDING, MODEL_VERSION = "embedding", "model_version"

# Neither judged nor summed: names of rows, and what is there for a replay.
ASIDE = {SAMPLE_ID, TEXT, EMBEDDING, BATCH_KEY, INPUT_IDS, MODEL_VERSION, "split"}
ASIDE |= {"image", "audio"}
# What is known only with a label, which production has later or never.
LABELLED = {LABEL, CORRECT, "label_log_probability"}

# Scores that say what another column says, or one minus it: judged once.
TWINS = {
    "msp": "deterministic_confidence",
    "mc_msp": CONFIDENCE,
    "mc_predictive_entropy": "predictive_entropy",
    "mc_expected_entropy": "expected_entropy",
    "mc_mutual_information": "mutual_information",
    "mc_disagreement": "disagreement",
}


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """What the scoring wrote beside the rows; empty where it wrote nothing."""
    text = (schema.metadata or {}).get(METADATA_KEY)
    return dict(json.loads(text)) if text else {}


def is_numeric(kind: pa.DataType) -> bool:
    """Numbers, and true/false, which count as 1 and 0."""
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def is_text(kind: pa.DataType) -> bool:
    """Text, whether stored plain or as a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def type_name(kind: pa.DataType) -> str:
    """A type by what it holds: how it is stored, and what a file calls a list's items, is aside."""
    if is_text(kind):
        return "string"
    return f"list<{kind.value_type}>" if _is_list(kind) else str(kind)


def numbers_of(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A numeric column as float64 [N], NaN where there is no value."""
    column = table.column(name)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)


def texts_of(table: pa.Table, name: str) -> list[str | None]:
    """A text column [N]."""
    found: list[str | None] = table.column(name).to_pylist()
    return found


def embeddings_of(table: pa.Table) -> NDArray[np.float32] | None:
    """Embeddings [N, D], N at least 1; None where there are none.

    Raises:
        ValueError: rows differ in length, or one has none.
    """
    if EMBEDDING not in table.column_names or not table.num_rows:
        return None
    column = table.column(EMBEDDING).combine_chunks()
    if pa.types.is_null(column.type) or column.null_count == len(column):
        return None
    flat = np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    lengths = set(column.value_lengths().to_pylist()) if _is_list(column.type) else {None}
    if column.null_count or len(lengths) > 1 or len(flat) % len(column):
        raise ValueError("every row needs an embedding of the same length")
    return flat.reshape(len(column), -1)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
