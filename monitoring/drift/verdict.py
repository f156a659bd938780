"""One column against its reference: all its tests, and the verdict over all columns together."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from monitoring.columns import EMBEDDING
from monitoring.drift.binning import NUM_BINS, binned
from monitoring.drift.embeddings import MIN_EFFECT, mmd
from monitoring.drift.result import ColumnDrift, DriftSettings, Kind
from monitoring.drift.statistics import TESTS, TestResult

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def adjust(found: list[ColumnDrift], settings: DriftSettings) -> list[ColumnDrift]:
    """Benjamini-Hochberg over all columns that have a p-value, and the verdicts.

    A column drifted if its adjusted p-value is at most the false discovery rate and its effect
    counts. (Benjamini & Hochberg, JRSS-B 1995; it also holds for columns that rise together.)
    """
    judged = [column for column in found if column.p_value is not None]
    p_values = [column.p_value for column in judged]
    adjusted = iter(false_discovery_control(p_values).tolist() if p_values else [])
    return [
        column if column.p_value is None else _verdict(column, next(adjusted), settings)
        for column in found
    ]


def judge_numeric(
    name: str, reference: FloatArray, window: FloatArray, settings: DriftSettings
) -> ColumnDrift:
    """One numeric column, [n] and [m]; NaN and infinities are left out.

    A column of a few different values is decided as categories are: tests for continuous values
    lose their power over ties.
    """
    reference, window = (values[np.isfinite(values)] for values in (reference, window))
    mean = float(window.mean()) if len(window) else None
    if (note := _too_few(len(reference), len(window), settings)) is not None:
        return ColumnDrift(name, "numeric", len(window), mean=mean, note=note)
    counts = binned(reference, window)
    tests = {
        test: each.run(*(counts if each.on_counts else (reference, window)))
        for test, each in TESTS.items()
    }
    few = len(np.unique(reference)) <= NUM_BINS
    deciding = [settings.categorical_test] if few else settings.numeric_tests
    found = _decided(name, "numeric", len(window), tests, deciding, settings)
    return replace(found, mean=mean)


def judge_counts(
    name: str, reference: IntArray, window: IntArray, settings: DriftSettings
) -> ColumnDrift:
    """One categorical column: counts [K] of the same categories."""
    if (note := _too_few(int(reference.sum()), int(window.sum()), settings)) is not None:
        return ColumnDrift(name, "categorical", int(window.sum()), note=note)
    tests = {name: each.run(reference, window) for name, each in TESTS.items() if each.on_counts}
    deciding = [settings.categorical_test]
    return _decided(name, "categorical", int(window.sum()), tests, deciding, settings)


def judge_embeddings(
    reference: NDArray[np.floating], window: NDArray[np.floating], settings: DriftSettings
) -> ColumnDrift:
    """Embeddings [n, D] and [m, D], rows with NaN left out.

    Of more than `max_embedding_rows` there are as many, evenly spread over the window.
    """
    window = window[np.isfinite(window).all(axis=1)]
    if (note := _too_few(len(reference), len(window), settings)) is not None:
        return ColumnDrift(EMBEDDING, "embedding", len(window), note=note)
    kept = _evenly(len(window), settings.max_embedding_rows)
    result = mmd(
        reference[: settings.max_embedding_rows],
        window[kept],
        num_permutations=settings.num_permutations,
        seed=settings.seed,
    )
    return _decided(EMBEDDING, "embedding", len(kept), {"mmd": result}, ("mmd",), settings)


def _too_few(num_reference: int, num_window: int, settings: DriftSettings) -> str | None:
    fewest = max(settings.min_rows, 2)
    for rows, where in ((num_window, "window"), (num_reference, "reference")):
        if rows < fewest:
            return f"{rows} values in the {where}; at least {fewest} are needed"
    return None


def _decided(
    name: str,
    kind: Kind,
    num_rows: int,
    tests: dict[str, TestResult],
    deciding: Sequence[str],
    settings: DriftSettings,
) -> ColumnDrift:
    """By the smallest p-value of the deciding tests, times their number (Bonferroni)."""
    p_values = {test: p for test in deciding if (p := tests[test].p_value) is not None}
    first = min(p_values, key=lambda test: p_values[test])
    default = TESTS[first].min_effect if first in TESTS else MIN_EFFECT
    return ColumnDrift(
        column=name,
        kind=kind,
        num_rows=num_rows,
        tests=tests,
        p_value=min(1.0, len(deciding) * p_values[first]),
        effect=tests[first].effect,
        effect_name=first,
        min_effect=settings.min_effects.get(first, default),
    )


def _verdict(column: ColumnDrift, adjusted: float, settings: DriftSettings) -> ColumnDrift:
    assert column.effect is not None
    assert column.min_effect is not None
    matters = column.effect >= column.min_effect
    drifted = matters and adjusted <= settings.false_discovery_rate
    return replace(column, adjusted_p_value=adjusted, drifted=drifted)


def _evenly(num_rows: int, at_most: int) -> IntArray:
    return np.unique(np.linspace(0, num_rows - 1, min(num_rows, at_most)).astype(np.int64))
