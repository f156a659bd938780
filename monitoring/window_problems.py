"""What keeps a window of scored rows from being compared with the reference, all of it at once."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from monitoring import columns

if TYPE_CHECKING:
    from monitoring.profile import ReferenceProfile

NUM_SHOWN = 10
# Rows that production scored itself may lack these: what is not there is not judged.
OPTIONAL = {
    columns.TEXT,
    columns.EMBEDDING,
    columns.BATCH_KEY,
    columns.INPUT_IDS,
    *columns.LABELLED,
}


def window_problems(
    table: pa.Table, metadata: Mapping[str, Any], profile: "ReferenceProfile"
) -> list[str]:
    """One sentence each."""
    problems = [*_model(table, metadata, profile), *_columns(table, profile)]
    if not table.num_rows:
        return [*problems, "there are no rows"]
    return [
        *problems,
        *_sample_ids(table),
        *_names(table, profile),
        *_numbers(table, profile),
        *_embeddings(table, profile),
    ]


def _model(
    table: pa.Table, metadata: Mapping[str, Any], profile: "ReferenceProfile"
) -> Iterator[str]:
    found = {metadata["model_version"]} if "model_version" in metadata else set()
    if columns.MODEL_VERSION in table.column_names:
        found |= {one for one in table.column(columns.MODEL_VERSION).to_pylist() if one is not None}
    for version in sorted(found - {profile.model_version}):
        yield (
            f"rows were scored by model {version}, the reference is of model "
            f"{profile.model_version}; score them with this run, or judge them by that model's"
        )

    passes = metadata.get("num_mc_passes")
    if None not in (passes, profile.num_mc_passes) and passes != profile.num_mc_passes:
        yield (
            f"rows were scored with {passes} Monte-Carlo passes, the reference with "
            f"{profile.num_mc_passes}; score them with evaluation.num_mc_passes="
            f"{profile.num_mc_passes}"
        )


def _columns(table: pa.Table, profile: "ReferenceProfile") -> Iterator[str]:
    kinds = {field.name: field.type for field in table.schema}
    for name in profile.own_columns:
        if name not in kinds and name not in OPTIONAL:
            yield f"there is no column {name!r}"
    for name, kind in kinds.items():
        if name in profile.numbers and not (columns.is_numeric(kind) or pa.types.is_null(kind)):
            yield f"column {name!r} holds {kind}, the reference has {profile.columns[name]}"
        if name in profile.categories and not (columns.is_text(kind) or pa.types.is_null(kind)):
            yield f"column {name!r} holds {kind}, the reference has {profile.columns[name]}"


def _sample_ids(table: pa.Table) -> Iterator[str]:
    if columns.SAMPLE_ID not in table.column_names:
        return
    ids = table.column(columns.SAMPLE_ID).to_pylist()
    without = [row for row, one in enumerate(ids) if one is None or one < 0]
    if without:
        yield f"column 'sample_id' needs whole numbers from 0 on; there is none in {_rows(without)}"
    twice = [one for one, count in Counter(ids).items() if count > 1 and one is not None]
    if twice:
        shown = ", ".join(map(str, twice[:NUM_SHOWN]))
        yield f"{len(twice)} sample ids occur more than once: {shown}"


def _names(table: pa.Table, profile: "ReferenceProfile") -> Iterator[str]:
    """Labels and predictions must be classes of the model."""
    known = set(profile.label_names or ())
    for name in (columns.LABEL, columns.PREDICTION):
        if not known or name not in table.column_names:
            continue
        if not columns.is_text(table.schema.field(name).type):
            continue
        found = columns.texts_of(table, name)
        for value in sorted({one for one in found if one is not None} - known)[:NUM_SHOWN]:
            at = _rows([row for row, one in enumerate(found) if one == value])
            yield f"column {name!r} has {value!r} in {at}, which is none of the model's classes"


def _numbers(table: pa.Table, profile: "ReferenceProfile") -> Iterator[str]:
    """A column that the reference knows whole must be whole: a NaN score says nothing."""
    for name, reference in profile.numbers.items():
        is_own = name in profile.own_columns and name not in OPTIONAL
        if not is_own or reference.missing or name not in table.column_names:
            continue
        if columns.is_numeric(table.schema.field(name).type):
            broken = np.flatnonzero(~np.isfinite(columns.numbers_of(table, name))).tolist()
            if broken:
                yield f"column {name!r} has no finite number in {_rows(broken)}"


def _embeddings(table: pa.Table, profile: "ReferenceProfile") -> Iterator[str]:
    reference = profile.sample_embeddings()
    if reference is None or columns.EMBEDDING not in table.column_names:
        return
    try:
        found = columns.embeddings_of(table)
    except (ValueError, pa.ArrowException) as error:
        yield f"column 'embedding': {error}"
        return
    if found is not None and found.shape[1] != reference.shape[1]:
        yield (
            f"column 'embedding' has {found.shape[1]} numbers a row, the reference "
            f"{reference.shape[1]}"
        )
    elif found is not None and not np.isfinite(found).all():
        broken = np.flatnonzero(~np.isfinite(found).all(axis=1)).tolist()
        yield f"column 'embedding' has numbers that are not finite in {_rows(broken)}"


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:NUM_SHOWN]))
    more = f" and {len(rows) - NUM_SHOWN} more" if len(rows) > NUM_SHOWN else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{more}"
