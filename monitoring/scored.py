"""Windows of scored rows: read from parquet, CSV or JSON lines, joined with labels, and checked.

Scored rows are what `masklock score` writes, or rows with the same columns that production scored
itself.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from monitoring import columns
from monitoring.columns import embeddings_of, numbers_of, texts_of
from monitoring.scored_files import read_labels, read_table
from monitoring.window_problems import window_problems
from pipeline.errors import DataError
from pipeline.records import sha256_of_file

if TYPE_CHECKING:
    from monitoring.profile import ReferenceProfile

SCORED_SCHEMA = "masklock-scored-v1"
# What must be the same for rows of several files to be one window.
_HOW = ("schema", "model_version", "plan_digest", "seed", "num_mc_passes", "batch_size", "task")


@dataclass(frozen=True, eq=False)
class Window:
    """N scored rows that are judged together."""

    table: pa.Table
    paths: tuple[Path, ...]
    sha256: str
    """Of the files with the rows; labels that come later leave it as it is."""
    metadata: Mapping[str, Any]
    """What the scoring wrote beside the rows; empty for rows that production scored itself."""

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.table.num_rows)

    def has(self, name: str) -> bool:
        """Whether there is a column of this name."""
        return name in self.table.column_names

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A numeric (or true/false) column as float64 [N], NaN where there is no value."""
        return numbers_of(self.table, name)

    def texts(self, name: str) -> list[str | None]:
        """A text column [N]."""
        return texts_of(self.table, name)

    def labels(self) -> list[str | None]:
        """The label of each row [N], None where there is none (yet)."""
        return self.texts(columns.LABEL) if self.has(columns.LABEL) else [None] * self.num_rows

    def embeddings(self) -> NDArray[np.float32] | None:
        """Embeddings [N, D]; None where the rows have none."""
        return embeddings_of(self.table)


def read_window(paths: Sequence[Path], labels: Sequence[Path] = ()) -> Window:
    """One window from its files, in their order.

    Args:
        paths: parquet, CSV or JSON lines of scored rows.
        labels: files with the columns `sample_id` and `label`, for labels that arrive later.

    Raises:
        DataError: a file cannot be read, files contradict each other, or labels do.
    """
    if not paths:
        raise DataError("A window needs at least one file of scored rows; none was named.")
    files = [Path(path) for path in paths]
    tables = [read_table(path) for path in files]
    metadata = _agreed([columns.metadata_of(table.schema) for table in tables], files)
    window = Window(_joined(tables, files), tuple(files), sha256_of(files), metadata)
    return _with_labels(window, [Path(path) for path in labels]) if labels else window


def require_matches(window: Window, profile: "ReferenceProfile") -> None:
    """Refuse a window that cannot be compared with the reference.

    Raises:
        DataError: every problem at once.
    """
    problems = window_problems(window.table, window.metadata, profile)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise DataError(f"window {_named(window.paths)}: {count}{lines}")


def sha256_of(files: Sequence[Path]) -> str:
    """What a window is known by: the hash of its file, or of the hashes of its files."""
    hashes = [sha256_of_file(path) for path in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


# -- several files -------------------------------------------------------------------------------


def _agreed(every: list[dict[str, Any]], files: list[Path]) -> dict[str, Any]:
    """What all files say about their scoring."""
    for metadata, path in zip(every, files, strict=True):
        schema = metadata.get("schema", SCORED_SCHEMA)
        if schema != SCORED_SCHEMA:
            raise DataError(
                f"{path} holds scored rows of the schema {schema!r}; this version of Masklock "
                f"reads {SCORED_SCHEMA!r}. Score the rows again: masklock score"
            )
        different = [name for name in _HOW if metadata.get(name) != every[0].get(name)]
        if different:
            found = ", ".join(
                f"{name} {every[0].get(name)} and {metadata.get(name)}" for name in different
            )
            raise DataError(
                f"{files[0]} and {path} were scored differently ({found}): judge them apart."
            )
    return every[0]


def _joined(tables: list[pa.Table], files: list[Path]) -> pa.Table:
    for table, path in zip(tables, files, strict=True):
        odd = sorted({*table.column_names} ^ {*tables[0].column_names})
        if odd:
            raise DataError(
                f"{files[0]} and {path} are one window only with the same columns; "
                f"{', '.join(odd)} are in one of the two."
            )
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowInvalid as error:
        raise DataError(f"The files of the window {_named(files)} differ: {error}") from error


def _named(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"


# -- labels that arrive later --------------------------------------------------------------------


def _with_labels(window: Window, files: list[Path]) -> Window:
    """The window with its labels filled in; rows that are still without keep none."""
    late, ids = read_labels(files), window.table.column(columns.SAMPLE_ID).to_pylist()
    if not set(ids) & set(late):
        raise DataError(
            f"{_named(files)} has labels for {len(late)} samples, but for none of the "
            f"{len(ids)} rows of {_named(window.paths)}. They are joined by sample_id."
        )
    both = list(zip(ids, window.labels(), strict=True))
    odd = [f"{i}: {one!r} and {late[i]!r}" for i, one in both if one and late.get(i, one) != one]
    if odd:
        raise DataError(
            f"{_named(files)} contradicts labels that {_named(window.paths)} has itself, for "
            f"{len(odd)} samples: {'; '.join(odd[:5])}"
        )
    found = pa.array([label or late.get(sample) for sample, label in both], pa.string())
    return replace(window, table=_judged(_set(window.table, columns.LABEL, found)))


def _judged(table: pa.Table) -> pa.Table:
    """`correct` follows from the labels; the probability of a label is known only when scoring."""
    if columns.PREDICTION not in table.column_names:
        return table
    pairs = zip(texts_of(table, columns.LABEL), texts_of(table, columns.PREDICTION), strict=True)
    right = [None if label is None else label == prediction for label, prediction in pairs]
    return _set(table, columns.CORRECT, pa.array(right, pa.bool_()))


def _set(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)
