"""Files of scored rows and of labels: parquet, CSV, JSON lines, each column in its own type."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from monitoring import columns
from pipeline.errors import DataError

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
_LONGEST_ROW = 2**24  # bytes: a row must fit the blocks that files are read in
_TEXTS = (columns.TEXT, columns.LABEL, columns.PREDICTION, columns.MODEL_VERSION)
_TYPES = {
    **dict.fromkeys(_TEXTS, pa.string()),
    columns.SAMPLE_ID: pa.int64(),
    columns.BATCH_KEY: pa.int64(),
    columns.CORRECT: pa.bool_(),
    columns.EMBEDDING: pa.list_(pa.float32()),
}


def read_table(path: Path) -> pa.Table:
    """The rows of one file, known columns in the types that `masklock score` gives them.

    Raises:
        DataError: there is no such file, it is of another format or damaged, or a known column
            holds something else.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}; a window is parquet, CSV or JSON lines.")
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path} is not one of {', '.join(FORMATS)}: rows are read from these.")
    try:
        table = _read(path, kind)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {error}") from error
    doubled = sorted({n for n in table.column_names if table.column_names.count(n) > 1})
    if doubled:
        raise DataError(f"{path} has several columns of the name {', '.join(doubled)}.")
    return _typed(table, path)


def read_labels(paths: Sequence[Path]) -> dict[int, str]:
    """Labels by sample_id, over all files; samples without a label are left out.

    Raises:
        DataError: a column is missing, or a sample has two labels.
    """
    found: dict[int, str] = {}
    for path in paths:
        table = read_table(path)
        missing = {columns.SAMPLE_ID, columns.LABEL} - set(table.column_names)
        if missing:
            raise DataError(
                f"{path}: labels need the columns sample_id and label; there is no "
                f"{' and no '.join(sorted(missing))}, but {', '.join(table.column_names)}."
            )
        ids, labels = (table.column(n).to_pylist() for n in (columns.SAMPLE_ID, columns.LABEL))
        for sample, label in zip(ids, labels, strict=True):
            if label is not None and found.setdefault(sample, label) != label:
                raise DataError(
                    f"{path}: sample {sample} has two labels, {found[sample]!r} and {label!r}."
                )
    return found


def _read(path: Path, kind: str) -> pa.Table:
    if kind == "parquet":
        return pq.read_table(path)
    if kind == "json":
        return pa.json.read_json(path, pa.json.ReadOptions(block_size=_LONGEST_ROW))
    texts = dict.fromkeys(_TEXTS, pa.string())  # a class may be called 7, or true
    return pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(block_size=_LONGEST_ROW),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=texts, strings_can_be_null=True),
    )


def _typed(table: pa.Table, path: Path) -> pa.Table:
    problems = []
    for name, kind in _TYPES.items():
        if name not in table.column_names or table.column(name).type == kind:
            continue
        try:
            values = _cast(table.column(name), kind)
            table = table.set_column(table.column_names.index(name), name, values)
        except (pa.ArrowException, ValueError) as error:
            problems.append(f"column {name!r} was to hold {kind}: {error}")
    if problems:
        raise DataError(f"{path}: {'; '.join(problems)}")
    return table


def _cast(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_fixed_size_list(values.type):
        values = values.cast(pa.list_(values.type.value_type))
    if kind == pa.list_(pa.float32()) and pa.types.is_list(values.type):
        return values.cast(kind, safe=False)
    if kind == pa.bool_() and pa.types.is_floating(values.type):
        return pc.not_equal(values, 0)  # 0 and 1 with gaps arrive as floats
    return values.cast(kind)
