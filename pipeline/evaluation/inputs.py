"""Raw rows of production: read from files, checked, prepared for the model; other columns kept."""

import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import RunConfig
from pipeline.errors import DataError
from pipeline.modality.bundle import LabelNames, modality_of
from pipeline.modality.domains import with_domains
from pipeline.modality.labels import label_values, row_list
from pipeline.modality.quarantine import Quarantine

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
SAMPLE_ID = "sample_id"
NUM_SHOWN = 10


def read_inputs(paths: Sequence[Path]) -> "Dataset":
    """The rows of all files, in their order.

    Raises:
        DataError: a file is missing, cannot be read, or has other columns than the first.
    """
    from datasets import concatenate_datasets

    if not paths:
        raise DataError("There is nothing to score: name files with --input.")
    parts = [_read(Path(path)) for path in paths]
    if len(parts) == 1:
        return parts[0]
    for path, part in zip(paths, parts, strict=True):
        if odd := sorted({*part.column_names} ^ {*parts[0].column_names}):
            raise DataError(
                f"{paths[0]} and {path} have other columns ({', '.join(odd)} in one of the two): "
                "score them apart."
            )
    try:
        return concatenate_datasets([part.cast(parts[0].features) for part in parts])
    except (ValueError, pa.ArrowException) as error:
        raise DataError(f"The inputs have other types in one file than another: {error}") from error


def require_usable(rows: "Dataset", config: RunConfig, label_names: LabelNames) -> None:
    """Refuse rows that cannot be scored.

    Raises:
        DataError: everything wrong with text, labels and sample ids.
    """
    _raise_if_any(_problems(rows, config, label_names))


def prepare_inputs(
    rows: "Dataset", config: RunConfig, processor: Any, label_names: LabelNames
) -> "Dataset":
    """Usable rows as the model takes them, numbered by their `sample_id` column or else by place.

    A label column, if there is one, becomes `labels` (-1 where a row has none).

    Raises:
        DataError: there is nothing that the model could predict, or a sample is broken.
    """
    modality, source = modality_of(config), config.data
    prepared = modality.prepare(rows, source, config, processor, None)
    prepared = with_domains(prepared, rows, config)
    if label_names is not None and source.label_column_name in rows.column_names:
        number = {name: place for place, name in enumerate(label_names)}
        values = label_values(rows, source.label_column_name)
        labels = [-1 if value is None else number[str(value)] for value in values]
        prepared = prepared.add_column("labels", labels)
    if SAMPLE_ID in rows.column_names:
        prepared = prepared.remove_columns(SAMPLE_ID).add_column(SAMPLE_ID, rows[SAMPLE_ID][:])
    judge = modality.judge
    if judge is not None:
        Quarantine(0.0).usable("inputs", prepared, lambda sample: judge(sample, config))
    if not len(prepared):
        raise DataError("The inputs make not one sample: the model predicts nothing of them.")
    return prepared


def carried_columns(
    rows: "Dataset",
    config: RunConfig,
    *,
    places: Sequence[int] | None = None,
    taken: Collection[str] = (),
) -> pa.Table | None:
    """The user's own columns; None where a sample is not a row.

    Args:
        rows: raw rows.
        config: tells which columns are text and label.
        places: of the rows wanted; by default all.
        taken: names to leave out.
    """
    names = [name for name in own_columns(rows, config) if name not in taken]
    if not names or not modality_of(config).one_sample_a_row:
        return None
    kept = rows.select_columns(names)
    if places is not None:
        kept = kept.select(places)
    return kept.with_format("arrow")[:]


def own_columns(rows: "Dataset", config: RunConfig) -> list[str]:
    """Columns that are neither input nor label nor the number of the row."""
    modality, source = modality_of(config), config.data
    inputs = (*modality.inputs(source).values(), *modality.optional_inputs(source))
    ours = {*inputs, config.data.label_column_name, SAMPLE_ID}
    return [name for name in rows.column_names if name not in ours]


# -- reading -------------------------------------------------------------------------------------


def _read(path: Path) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    if not path.is_file():
        raise DataError(f"There is no file {path}; inputs are {', '.join(LOADERS)}.")
    loader = LOADERS.get(path.suffix.lower())
    if loader is None:
        raise DataError(f"{path} is not one of {', '.join(LOADERS)}: inputs are read from these.")
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    # A cache of its own, gone at once: windows of production would fill the user's.
    with tempfile.TemporaryDirectory() as cache:
        try:
            if loader == "parquet" and not pq.read_metadata(path).num_rows:  # load_dataset fails
                raise DataError(f"{path}: there are no rows")
            return load_dataset(
                loader,
                data_files=[str(path)],
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
        except (OSError, ValueError, RuntimeError, DatasetsError, pa.ArrowException) as error:
            reason = error.__cause__ or error
            raise DataError(f"{path} cannot be read as {loader}: {reason}") from error


# -- checking ------------------------------------------------------------------------------------


def _problems(rows: "Dataset", config: RunConfig, label_names: LabelNames) -> list[str]:
    modality, source = modality_of(config), config.data
    if not len(rows):
        return ["there are no rows"]
    problems: list[str] = []
    missing = [
        f"there is no column {column!r} (data.{key}); there are: {', '.join(rows.column_names)}"
        for key, column in modality.inputs(source).items()
        if column not in rows.column_names
    ]
    problems += missing or modality.problems(rows, source, None)
    if label_names is not None and source.label_column_name in rows.column_names:
        problems += _unknown_labels(rows, source.label_column_name, label_names)
    if SAMPLE_ID in rows.column_names:
        problems += _odd_sample_ids(rows, modality.one_sample_a_row, modality.task)
    return problems


def _unknown_labels(rows: "Dataset", column: str, names: tuple[str, ...]) -> list[str]:
    """Labels that the model has no class for; production rows may have none."""
    at: dict[str, list[int]] = {}
    for row, value in enumerate(label_values(rows, column)):
        if value is not None and str(value) not in names:
            at.setdefault(str(value), []).append(row)
    known = ", ".join(names[:NUM_SHOWN]) + ", ..." * (len(names) > NUM_SHOWN)
    return [
        f"column {column!r} has the label {value!r} in {row_list(found)}, which is none of the "
        f"model's {len(names)} classes: {known}"
        for value, found in list(at.items())[:NUM_SHOWN]
    ]


def _odd_sample_ids(rows: "Dataset", one_sample_a_row: bool, task: str) -> list[str]:
    if not one_sample_a_row:
        return [f"column {SAMPLE_ID!r}: {task} cuts rows into samples, which number themselves"]
    ids = rows[SAMPLE_ID][:]
    odd = [row for row, one in enumerate(ids) if not isinstance(one, int) or one < 0]
    if odd:
        example = ids[odd[0]]
        return [
            f"column {SAMPLE_ID!r} needs whole numbers from 0 on; found {example!r} in "
            f"{row_list(odd)}"
        ]
    if twice := [one for one, count in Counter(ids).items() if count > 1]:
        shown = ", ".join(map(str, twice[:NUM_SHOWN]))
        return [f"column {SAMPLE_ID!r} has {len(twice)} numbers more than once: {shown}"]
    return []


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise DataError(f"inputs: {count}{lines}")
