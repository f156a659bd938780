"""Rows whose input is a file, an image or a clip: kept encoded until a batch is made."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.config.schema import DataSource
from pipeline.modality.bundle import LabelNames, kept_rows
from pipeline.modality.labels import label_numbers, label_problems

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SCALARS = ("labels", "sample_id", "domain", "mask_step")  # one number a row


def encoded_rows(
    rows: "Dataset", column: str, name: str, feature: Any, max_samples: int | None
) -> "tuple[Dataset, Dataset]":
    """The rows that a limit keeps, and of each its file, called `name`, and its `sample_id`."""
    kept, numbers = kept_rows(rows, max_samples)
    files = kept.select_columns([column]).cast_column(column, feature)
    if column != name:
        files = files.rename_column(column, name)
    return kept, files.add_column("sample_id", numbers)


def with_labels(
    found: "Dataset", kept: "Dataset", source: DataSource, label_names: LabelNames
) -> "Dataset":
    """Prepared rows with `labels`, where there are label names."""
    if label_names is None:
        return found
    return found.add_column("labels", label_numbers(kept, source.label_column_name, label_names))


def file_problems(
    rows: "Dataset",
    column: str,
    kind: type,
    plural: str,
    source: DataSource,
    label_names: LabelNames,
) -> Iterator[str]:
    """A column that holds no files of this kind (datasets' feature); all about the labels."""
    from datasets import Value

    feature: Any = rows.features[column]
    is_file = (
        isinstance(feature, kind)
        or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary", "string"))
        or (isinstance(feature, dict) and "bytes" in feature)
    )
    if not is_file:
        yield f"column {column!r} holds {feature}, not {plural}; name another column"
    if label_names is not None:
        yield from label_problems(rows, source.label_column_name, label_names)


def files_as_arrow(files: list[Any]) -> "pa.Array":
    """Files as a column of scored rows."""
    import pyarrow as pa

    return pa.array(files, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def scalars_of(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The numbers of the rows of a batch, those that they have."""
    present = [name for name in SCALARS if name in rows[0]]
    return {name: torch.tensor([row[name] for row in rows]) for name in present}
