"""The rows that two evaluations have in common, set by set, in one order."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import DataError

TEST = "test"
RETENTION = "retention/"
_IDENTITY = ("text", "label")


class MissingNumbers(Exception):
    """A column that cannot be compared; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Pair:
    """N rows of both runs; row i of `a` and of `b` are the same sample."""

    a: pa.Table
    b: pa.Table

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.a.num_rows)

    @property
    def fingerprint(self) -> str:
        """sha256 over ids, texts and labels."""
        digest = hashlib.sha256()
        for name in ("sample_id", *_IDENTITY):
            if name in self.a.column_names:
                digest.update(repr((name, self.a[name].to_pylist())).encode())
        return digest.hexdigest()

    def has(self, name: str) -> bool:
        """Whether either run has the column."""
        return name in self.a.column_names or name in self.b.column_names

    def numbers(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """A column of both runs, float64 [N] each.

        Raises:
            MissingNumbers: a run lacks it, or it holds nulls, NaN or infinities.
        """
        return _numbers(self.a, name, "the first run"), _numbers(self.b, name, "the second run")


def paired(
    a: pa.Table, b: pa.Table, retention: Mapping[str, range]
) -> tuple[dict[str, Pair], list[str]]:
    """Pairs by name: `test`, `ood:<name>`, `retention/<name>`; and what a reader should know.

    Raises:
        DataError: no rows in common; the same id twice, or for different rows.
    """
    notes: list[str] = []
    pairs: dict[str, Pair] = {}
    for split in _splits(a, b):
        of_a, of_b = (table.filter(pc.equal(table["split"], split)) for table in (a, b))
        if split == TEST:
            for name, ids in retention.items():
                kept_a, kept_b = (_within(table, ids) for table in (of_a, of_b))
                name = f"{RETENTION}{name}"
                pairs[name] = _pair(kept_a, kept_b, name, notes)
            of_a, of_b = (_outside(table, retention) for table in (of_a, of_b))
        pairs[split] = _pair(of_a, of_b, split, notes)
    empty = [name for name, pair in pairs.items() if not pair.num_rows]
    if TEST not in pairs or TEST in empty:
        raise DataError(
            "Two runs are compared on the test rows that both have, but these have none in "
            "common. Evaluate both on the same data: masklock evaluate RUN data.test_split=..."
        )
    return {name: pair for name, pair in pairs.items() if name not in empty}, notes


def _splits(a: pa.Table, b: pa.Table) -> list[str]:
    found = [dict.fromkeys(table["split"].to_pylist()) for table in (a, b)]
    return list(found[0] | found[1])


def _pair(a: pa.Table, b: pa.Table, split: str, notes: list[str]) -> Pair:
    ids_a, ids_b = (_ids(table, split) for table in (a, b))
    common, rows_a, rows_b = np.intersect1d(ids_a, ids_b, assume_unique=True, return_indices=True)
    for ids, other, who in ((ids_a, ids_b, "first"), (ids_b, ids_a, "second")):
        if extra := len(np.setdiff1d(ids, other)):
            notes.append(f"{split}: {extra} rows are in the {who} run only and are left out")
    pair = Pair(a.take(rows_a), b.take(rows_b))
    _require_same_rows(pair, common, split)
    return pair


def _ids(table: pa.Table, split: str) -> NDArray[np.int64]:
    ids = np.asarray(table["sample_id"].to_numpy(), dtype=np.int64)
    if len(np.unique(ids)) != len(ids):
        raise DataError(f"{split}: a sample_id stands in two rows of one run. Evaluate it again.")
    return ids


def _require_same_rows(pair: Pair, ids: NDArray[np.int64], split: str) -> None:
    for name in _IDENTITY:
        if not (name in pair.a.column_names and name in pair.b.column_names):
            continue
        of_a, of_b = (np.array(table[name].to_pylist(), object) for table in (pair.a, pair.b))
        differ = np.flatnonzero(of_a != of_b)
        if len(differ):
            first = differ[0]
            raise DataError(
                f"{split}: {len(differ)} of {pair.num_rows} samples have another {name} in the "
                f"second run (sample {ids[first]}: {of_a[first]!r:.80} and {of_b[first]!r:.80}). "
                "The runs were evaluated on other data: evaluate both on the same."
            )


def _numbers(table: pa.Table, name: str, who: str) -> NDArray[np.float64]:
    if name not in table.column_names:
        raise MissingNumbers(f"{who} has no column {name}")
    values = np.array(
        [np.nan if value is None else float(value) for value in table[name].to_pylist()]
    )
    if wrong := int((~np.isfinite(values)).sum()):
        raise MissingNumbers(f"{name} is missing, NaN or infinite in {wrong} rows of {who}")
    return values


def _within(table: pa.Table, ids: range) -> pa.Table:
    column = table["sample_id"]
    return table.filter(pc.and_(pc.greater_equal(column, ids.start), pc.less(column, ids.stop)))


def _outside(table: pa.Table, retention: Mapping[str, range]) -> pa.Table:
    for ids in retention.values():
        column = table["sample_id"]
        table = table.filter(pc.or_(pc.less(column, ids.start), pc.greater_equal(column, ids.stop)))
    return table
