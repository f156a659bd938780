"""A window against the profile: every column, the embedding, and the quality of the predictions."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from monitoring import columns
from monitoring.drift import performance
from monitoring.drift.binning import category_counts
from monitoring.drift.result import ColumnDrift, DriftSettings, Estimate, WindowDrift
from monitoring.drift.verdict import adjust, judge_counts, judge_embeddings, judge_numeric
from monitoring.profile import ReferenceProfile
from monitoring.scored import Window
from monitoring.summaries import OTHER

FloatArray = NDArray[np.float64]


def judge_window(
    profile: ReferenceProfile, window: Window, settings: DriftSettings | None = None
) -> WindowDrift:
    """Judge one window of scored rows, already found comparable with the profile.

    Columns that only one side has are named in `not_compared`. Nothing is raised for windows that
    are too small: their columns say so.
    """
    settings = settings or DriftSettings()
    found = [
        *_numeric_columns(profile, window, settings),
        *_categorical_columns(profile, window, settings),
        *_embedding(profile, window, settings),
    ]
    correct = _correct(window)
    return WindowDrift(
        num_rows=window.num_rows,
        num_labelled=int(np.isfinite(correct).sum()),
        columns=adjust(found, settings),
        performance=_performance(profile, window, correct, settings),
        not_compared=_not_compared(profile, window),
    )


# -- the columns of a window ---------------------------------------------------------------------


def _numeric_columns(
    profile: ReferenceProfile, window: Window, settings: DriftSettings
) -> list[ColumnDrift]:
    found = []
    for name, summary in profile.numbers.items():
        if name in settings.ignore or name in columns.LABELLED or not window.has(name):
            continue
        if (twin := columns.TWINS.get(name)) in profile.numbers and window.has(str(twin)):
            continue
        values = window.numbers(name)
        found.append(judge_numeric(name, profile.sample_numbers(name), values, settings))
        missing = int((~np.isfinite(values)).sum())
        if missing or summary.missing:
            here = np.array([len(values) - missing, missing])
            there = np.array([summary.count, summary.missing])
            found.append(judge_counts(f"{name}.missing", there, here, settings))
    return found


def _categorical_columns(
    profile: ReferenceProfile, window: Window, settings: DriftSettings
) -> list[ColumnDrift]:
    found = []
    for name, reference in profile.categories.items():
        if not window.has(name) or name in settings.ignore:
            continue
        names = window.labels() if name == columns.LABEL else _texts(window, name)
        counts = category_counts(reference, (one for one in names if one is not None))
        if _hardly_repeats(reference):
            note = "names that hardly repeat in the reference cannot be compared"
            found.append(ColumnDrift(name, "categorical", int(counts[1].sum()), note=note))
        else:
            found.append(judge_counts(name, *counts, settings))
    return found


def _hardly_repeats(reference: Mapping[str, int]) -> bool:
    """Whether names are like ids: those of any window would all be new."""
    named = [count for name, count in reference.items() if name != OTHER]
    return 2 * len(named) > sum(named)


def _embedding(
    profile: ReferenceProfile, window: Window, settings: DriftSettings
) -> list[ColumnDrift]:
    reference, rows = profile.sample_embeddings(), window.embeddings()
    if reference is None or rows is None or columns.EMBEDDING in settings.ignore:
        return []
    return [judge_embeddings(reference, rows, settings)]


def _not_compared(profile: ReferenceProfile, window: Window) -> dict[str, str]:
    known = {*profile.numbers, *profile.categories} - columns.LABELLED
    here = set(window.table.column_names) - columns.ASIDE - columns.LABELLED
    only_there = {name: "not in the window" for name in sorted(known - here)}
    return only_there | {name: "not in the reference profile" for name in sorted(here - known)}


def _texts(window: Window, name: str) -> list[str | None]:
    return columns.texts_of(window.table, name)


# -- quality -------------------------------------------------------------------------------------


def _performance(
    profile: ReferenceProfile, window: Window, correct: FloatArray, settings: DriftSettings
) -> dict[str, Estimate]:
    """With labels what the quality is, without them what the confidences say of it."""
    reference = profile.calibration
    if reference is None or not window.has(columns.CONFIDENCE):
        return {}
    level = settings.confidence_level
    confidence = window.numbers(columns.CONFIDENCE)
    found: dict[str, Estimate | None] = {}
    known, hits = performance.known(confidence, correct)
    if len(hits):
        right = hits == 1
        num_correct, num_rows = int(reference.correct.sum()), int(reference.count.sum())
        found["accuracy"] = performance.accuracy(right, (num_correct, num_rows), level)
        found["ece"] = performance.calibration_error(
            known,
            right,
            reference.error,
            num_bins=len(reference.count),
            level=level,
            seed=settings.seed,
        )
        found["calibration_shift"] = performance.calibration_shift(
            known, right, reference.count, reference.correct, level
        )
    if len(losses := _log_probabilities(window)):
        summary = profile.numbers.get("label_log_probability")
        found["nll"] = performance.negative_log_likelihood(
            losses, None if summary is None else -summary.mean, level
        )
    (known,) = performance.known(confidence)
    if len(known):
        found["estimated_accuracy"] = performance.estimated_accuracy(
            known, reference.count, reference.correct, level
        )
    return {name: one for name, one in found.items() if one is not None}


def _correct(window: Window) -> FloatArray:
    """1, 0, or NaN for a row without label, [N]."""
    pairs = zip(window.labels(), _predictions(window), strict=True)
    return np.array(
        [np.nan if None in (label, found) else float(label == found) for label, found in pairs]
    )


def _predictions(window: Window) -> list[str | None]:
    if not window.has(columns.PREDICTION):
        return [None] * window.num_rows
    return _texts(window, columns.PREDICTION)


def _log_probabilities(window: Window) -> FloatArray:
    if not window.has("label_log_probability"):
        return np.empty(0)
    return performance.known(window.numbers("label_log_probability"))[0]
