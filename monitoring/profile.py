"""The reference profile: what the evaluation learned of its test rows, as sums that can be merged.

Profiles of parts of the rows, in any order, merge into the profile of the whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from monitoring import columns
from monitoring.columns import numbers_of, texts_of
from monitoring.exact_sums import ExactSum, products
from monitoring.profile_files import read_parts, write_parts
from monitoring.summaries import (
    SIGNED_LOG,
    UNIT,
    CalibrationBins,
    ClassSums,
    NumericSummary,
    add_categories,
    category_counts,
)
from pipeline.errors import DataError
from pipeline.records import RunFolder

NUM_BINS = 15
MAX_SAMPLE_ROWS = 2000
MAX_SAMPLE_ELEMENTS = 2**21  # of embeddings: wide ones leave room for fewer rows
MAX_MOMENT_DIMENSIONS = 1024
BETWEEN_0_AND_1 = {
    "confidence",
    "deterministic_confidence",
    "calibrated_confidence",
    "disagreement",
    "mc_disagreement",
    "msp",
    "mc_msp",
    "unknown_token_share",
}


@dataclass(frozen=True, eq=False)
class ReferenceProfile:
    """Counts, sums, histograms and a keyed sample of N reference rows."""

    model_version: str
    task: str
    label_names: tuple[str, ...] | None
    """Classes of the model; None for tasks without."""
    num_mc_passes: int | None
    """Monte-Carlo passes behind every score; None where the rows do not say."""
    num_rows: int
    columns: Mapping[str, str]
    """Type of every scored column."""
    own_columns: tuple[str, ...]
    """Those that the scoring itself adds; the others came with the user's rows."""
    numbers: Mapping[str, NumericSummary]
    categories: Mapping[str, Mapping[str, int]]
    """Counts by value: `prediction`, `label`, and text columns of the user."""
    classes: ClassSums | None
    """None without embeddings."""
    moment: ExactSum | None
    """Sum of x x^T over embeddings, [D, D]; None without them, and for D > 1,024."""
    calibration: CalibrationBins | None
    """None without confidences and labels."""
    sample: pa.Table
    """At most 2,000 rows chosen by key: `sample_id`, numeric columns, `embedding` in float16."""

    @property
    def second_moment(self) -> NDArray[np.float64] | None:
        """Sum of x x^T over the embeddings, [D, D], shared by all classes."""
        return None if self.moment is None else self.moment.high

    def sample_numbers(self, name: str) -> NDArray[np.float64]:
        """A numeric column of the sample, NaN where there is no value."""
        return numbers_of(self.sample, name)

    def sample_embeddings(self) -> NDArray[np.float32] | None:
        """Embeddings of the sample, [K, D]."""
        return columns.embeddings_of(self.sample)


def profile_of(
    table: pa.Table, *, model_version: str, num_bins: int = NUM_BINS
) -> ReferenceProfile:
    """The profile of scored rows."""
    about = columns.metadata_of(table.schema)
    fields = {field.name: field.type for field in table.schema}
    judged = {name: kind for name, kind in fields.items() if name not in columns.ASIDE}
    numeric = [name for name, kind in judged.items() if columns.is_numeric(kind)]
    embeddings = columns.embeddings_of(table)
    label_names = about.get("label_names")
    return ReferenceProfile(
        model_version=model_version,
        task=about.get("task", ""),
        label_names=tuple(label_names) if label_names else None,
        num_mc_passes=about.get("num_mc_passes"),
        num_rows=table.num_rows,
        columns={name: columns.type_name(kind) for name, kind in fields.items()},
        own_columns=tuple(name for name in fields if name not in about.get("carried", ())),
        numbers={
            name: NumericSummary.of(numbers_of(table, name), _grid(name, fields[name]))
            for name in numeric
        },
        categories={
            name: category_counts(texts_of(table, name))
            for name, kind in judged.items()
            if columns.is_text(kind)
        },
        classes=None if embeddings is None else _class_sums(table, embeddings),
        moment=_moment(embeddings),
        calibration=_calibration(table, num_bins),
        sample=_sample(table),
    )


def merge(first: ReferenceProfile, second: ReferenceProfile) -> ReferenceProfile:
    """The profile of the rows of both.

    Raises:
        DataError: they are of different models or columns, or share rows.
    """
    _require_mergeable(first, second)
    return ReferenceProfile(
        model_version=first.model_version,
        task=first.task,
        label_names=first.label_names,
        num_mc_passes=first.num_mc_passes,
        num_rows=first.num_rows + second.num_rows,
        columns=first.columns,
        own_columns=first.own_columns,
        numbers={name: one + second.numbers[name] for name, one in first.numbers.items()},
        categories={
            name: add_categories(counts, second.categories[name])
            for name, counts in first.categories.items()
        },
        classes=_added(first.classes, second.classes),
        moment=_added(first.moment, second.moment),
        calibration=_added(first.calibration, second.calibration),
        sample=_merged_samples(first, second),
    )


def save_profile(folder: RunFolder, scored: pa.Table) -> None:
    """Write the profile of scored rows that say which model scored them."""
    version = columns.metadata_of(scored.schema)["model_version"]
    write_profile(folder, profile_of(scored, model_version=version))


def write_profile(folder: RunFolder, profile: ReferenceProfile) -> None:
    """Write profile/: profile.json, arrays.npz and sample.parquet."""
    write_parts(folder.profile, vars(profile))


def read_profile(folder: RunFolder, model_version: str | None = None) -> ReferenceProfile:
    """Read it back, its hashes verified.

    Args:
        folder: the run.
        model_version: if given, that of the run's present model, which the profile must be of.

    Raises:
        RunFolderError: there is none, it is damaged, or of another schema or model version.
    """
    return ReferenceProfile(**read_parts(folder.profile, model_version))


# -- parts of a profile --------------------------------------------------------------------------


def _grid(name: str, kind: pa.DataType) -> str:
    return UNIT if name in BETWEEN_0_AND_1 or pa.types.is_boolean(kind) else SIGNED_LOG


def _class_sums(table: pa.Table, embeddings: NDArray[np.float32]) -> ClassSums:
    """By label, or where a row has none by prediction; one class for tasks without classes."""
    fields = table.column_names
    given = [texts_of(table, one) for one in (columns.LABEL, columns.PREDICTION) if one in fields]
    of_row = [next((n for n in row if n is not None), "") for row in zip(*given, strict=True)]
    names, numbers = np.unique(of_row or [""] * len(embeddings), return_inverse=True)
    belongs = np.zeros((len(embeddings), len(names)))
    belongs[np.arange(len(embeddings)), numbers] = 1
    return ClassSums(
        names=tuple(names.tolist()),
        counts=np.bincount(numbers, minlength=len(names)).astype(np.int64),
        sums=products(belongs, embeddings.astype(np.float64)),
    )


def _moment(embeddings: NDArray[np.float32] | None) -> ExactSum | None:
    if embeddings is None or embeddings.shape[1] > MAX_MOMENT_DIMENSIONS:
        return None
    wide = embeddings.astype(np.float64)
    return products(wide, wide)


def _calibration(table: pa.Table, num_bins: int) -> CalibrationBins | None:
    if not {columns.CONFIDENCE, columns.CORRECT} <= set(table.column_names):
        return None
    confidence, correct = (numbers_of(table, n) for n in (columns.CONFIDENCE, columns.CORRECT))
    known = np.isfinite(confidence) & np.isfinite(correct)
    return CalibrationBins.of(confidence[known], correct[known] == 1, num_bins)


def _sample(table: pa.Table) -> pa.Table:
    """Of rows chosen by key, what statistical tests need: numbers and embeddings."""
    chosen = _chosen(table)
    kept: dict[str, pa.Array] = {columns.SAMPLE_ID: chosen.column(columns.SAMPLE_ID)}
    for field in table.schema:
        if field.name not in columns.ASIDE and columns.is_numeric(field.type):
            kept[field.name] = pa.array(numbers_of(chosen, field.name), from_pandas=True)
    if (embeddings := columns.embeddings_of(chosen)) is not None:
        kept[columns.EMBEDDING] = _in_half_precision(embeddings)
    return pa.table(kept)


def _chosen(table: pa.Table) -> pa.Table:
    """The rows whose ids have the smallest keys: whatever the parts, the same rows of the whole."""
    embedding = columns.embeddings_of(table.slice(0, 1))
    width = 1 if embedding is None else embedding.shape[1]
    limit = min(MAX_SAMPLE_ROWS, MAX_SAMPLE_ELEMENTS // width)
    ids = table.column(columns.SAMPLE_ID).to_pylist()
    if len(set(ids)) < len(ids):
        raise DataError(
            "A profile counts every row once, but rows share a sample_id. Give each row its own, "
            "and merge profiles of different rows only."
        )
    order = sorted(range(len(ids)), key=lambda place: _key(ids[place]))
    return table.take(pa.array(order[:limit], pa.int64()))


def _key(sample_id: int) -> bytes:
    return blake2b(str(sample_id).encode(), digest_size=8).digest()


def _in_half_precision(embeddings: NDArray[np.float32]) -> pa.Array:
    largest = float(np.finfo(np.float16).max)
    half = np.clip(embeddings, -largest, largest).astype(np.float16)
    return pa.FixedSizeListArray.from_arrays(pa.array(half.reshape(-1)), embeddings.shape[1])


# -- merging -------------------------------------------------------------------------------------


def _added(first: Any, second: Any) -> Any:
    """Sums of both; a part without rows may have none."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _merged_samples(first: ReferenceProfile, second: ReferenceProfile) -> pa.Table:
    parts = [part.sample for part in (first, second) if part.num_rows]
    if len(parts) < 2:
        return parts[0] if parts else first.sample
    return _chosen(pa.concat_tables(parts))


def _require_mergeable(first: ReferenceProfile, second: ReferenceProfile) -> None:
    ours, theirs = _facts(first), _facts(second)
    problems = [
        f"{name}: {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]
    ]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise DataError(f"These profiles are of different things and cannot be merged:{lines}")


def _facts(profile: ReferenceProfile) -> dict[str, Any]:
    """What must be the same in profiles of parts."""
    names = ("model_version", "task", "label_names", "num_mc_passes", "columns", "own_columns")
    bins = 0 if profile.calibration is None else len(profile.calibration.count)
    return {**{name: getattr(profile, name) for name in names}, "calibration bins": bins}
