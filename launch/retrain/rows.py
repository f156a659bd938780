"""The rows of a challenger: new ones, and a keyed share of the old ones. Checked before training.

Old rows are the recipe's training rows and the new rows of promoted retrainings. Rows whose text
stands among the frozen rows are left out: a gate must not be passed by heart.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet
from pyarrow import json as arrow_json

from pipeline.errors import DataError
from pipeline.records import flush

Row = dict[str, Any]
_READERS = {".parquet": parquet.read_table, ".csv": csv.read_csv, ".jsonl": arrow_json.read_json}
_NUM_SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """Names of the columns that matter."""

    text: str
    label: str | None
    """None: rows without labels (text-generation)."""
    domain: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that rows must have."""
        return tuple(name for name in (self.text, self.label, self.domain) if name is not None)


@dataclass(frozen=True)
class Sources:
    """Where the rows of one retraining come from."""

    base: Path
    """The recipe's rows: train, validation and test.parquet, and rows.json."""
    learned: Sequence[Path]
    """new.parquet of earlier retrainings that were promoted."""
    new: Sequence[Path]
    retention: Mapping[str, Sequence[Path]]


def mix(
    sources: Sources, columns: Columns, replay_share: float, key: str, output: Path
) -> dict[str, Any]:
    """Write train, validation, test and new.parquet; returns what was done, in numbers.

    Args:
        key: decides which old rows are replayed; another one draws others.

    Raises:
        DataError: every problem of the files with labels.
    """
    described = json.loads((sources.base / "rows.json").read_text(encoding="utf-8"))
    names: list[str] | None = described["label_names"] if columns.label else None
    train, validation, test = (
        parquet.read_table(sources.base / f"{split}.parquet")
        for split in ("train", "validation", "test")
    )
    problems: list[str] = []
    incoming = _read_all(sources.new, columns, names, problems)
    kept = {
        name: _read_all(paths, columns, names, problems)
        for name, paths in sources.retention.items()
    }
    _raise_if_any(problems)
    frozen = [row for table in (validation, test) for row in table.to_pylist()]
    frozen += [row for rows in kept.values() for row in rows]
    old = [*train.to_pylist(), *_learned(sources.learned)]
    new, left_out = _new(incoming, old, frozen, columns)
    replayed = _replayed(old, replay_share, key, columns)
    retention = _write_test(output, test, kept)
    for split, rows in (("train", [*new, *replayed]), ("new", new)):
        _write(output / f"{split}.parquet", pa.Table.from_pylist(rows, schema=train.schema))
    _write(output / "validation.parquet", validation)
    return {
        "new": len(new),
        "replayed": len(replayed),
        "old": len(old),
        "left_out": left_out,
        "frozen": test.num_rows,
        "retention": retention,
    }


def _learned(paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        yield from parquet.read_table(path).to_pylist()


def _write_test(
    output: Path, test: pa.Table, kept: Mapping[str, list[Row]]
) -> dict[str, tuple[int, int]]:
    """The frozen rows, then each retention set; returns the row numbers of these."""
    tables, ranges, end = [test], {}, test.num_rows
    for name, rows in kept.items():
        tables.append(pa.Table.from_pylist(rows, schema=test.schema))
        ranges[name] = (end, end + len(rows))
        end += len(rows)
    _write(output / "test.parquet", pa.concat_tables(tables))
    return ranges


def _new(
    incoming: Sequence[Row], old: Sequence[Row], frozen: Sequence[Row], columns: Columns
) -> tuple[list[Row], dict[str, int]]:
    """Rows that are neither known, frozen, doubled nor contradicted; and how many were which."""
    known = {_digest(row, columns) for row in old}
    held = {row[columns.text] for row in frozen}
    labels: dict[str, set[Any]] = {}
    for row in incoming:
        labels.setdefault(row[columns.text], set()).add(row.get(columns.label or ""))
    kept: list[Row] = []
    left_out = Counter({"known": 0, "frozen": 0, "contradicted": 0})
    for row in incoming:
        digest = _digest(row, columns)
        if row[columns.text] in held:
            left_out["frozen"] += 1
        elif len(labels[row[columns.text]]) > 1:
            left_out["contradicted"] += 1
        elif digest in known:
            left_out["known"] += 1
        else:
            known.add(digest)
            kept.append(row)
    return kept, dict(left_out)


def _replayed(old: Sequence[Row], share: float, key: str, columns: Columns) -> list[Row]:
    """The rows with the smallest keyed hashes, in their own order."""
    wanted = round(share * len(old))
    ranks = [
        (hashlib.blake2b(_digest(row, columns), key=key.encode()[:64]).digest(), place)
        for place, row in enumerate(old)
    ]
    return [old[place] for place in sorted(place for _, place in sorted(ranks)[:wanted])]


def _digest(row: Row, columns: Columns) -> bytes:
    label = row.get(columns.label) if columns.label else None
    text = json.dumps([row[columns.text], label], ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _read_all(
    paths: Iterable[Path], columns: Columns, names: list[str] | None, problems: list[str]
) -> list[Row]:
    return [row for path in paths for row in _read(path, columns, names, problems)]


def _read(path: Path, columns: Columns, names: list[str] | None, problems: list[str]) -> list[Row]:
    """Rows of one file, labels as numbers of their class; problems are said, not raised."""
    try:
        table = _READERS[{".json": ".jsonl"}.get(path.suffix, path.suffix)](path)
    except KeyError:
        problems.append(f"{path}: rows come as {', '.join(_READERS)}")
        return []
    except (pa.ArrowException, OSError) as error:
        problems.append(f"{path} cannot be read: {' '.join(str(error).split())}")
        return []
    missing = [name for name in columns.names if name not in table.column_names]
    if missing:
        there = ", ".join(table.column_names)
        problems.append(f"{path} has no column {', '.join(missing)}; there are: {there}")
        return []
    rows: list[Row] = table.select(list(columns.names)).to_pylist()
    problems.extend(f"{path}: {problem}" for problem in _faults(rows, columns, names))
    if columns.label is None or names is None:
        return rows
    number = {name: place for place, name in enumerate(names)}
    return [row | {columns.label: number.get(_word(row[columns.label]), -1)} for row in rows]


def _faults(rows: Sequence[Row], columns: Columns, names: list[str] | None) -> Iterator[str]:
    empty = [n for n, row in enumerate(rows) if not str(row[columns.text] or "").strip()]
    if empty:
        yield f"{len(empty)} rows have no text, the first is row {empty[0]}"
    if columns.label is not None and names is not None:
        found = Counter(_word(row[columns.label]) for row in rows)
        unknown = {label: count for label, count in found.items() if label not in names}
        for label, count in list(unknown.items())[:_NUM_SHOWN]:
            yield (
                f"{count} rows have the label {label!r}, which is none of the model's "
                f"{len(names)}: a new class needs a new recipe, not a retraining"
            )


def _word(label: Any) -> str:
    """A label as the name of its class; whole numbers may come as floats."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return "(missing)" if label is None else str(label)


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    parquet.write_table(table, unfinished)
    flush(unfinished)
    os.replace(unfinished, path)


def _raise_if_any(problems: Sequence[str]) -> None:
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise DataError(f"The labelled rows cannot be used:\n{listed}")
