"""The numbers of one window, by the keys that rules, dashboards and the history know them by."""

import math
from collections.abc import Mapping

import numpy as np

from monitoring import columns
from monitoring.drift import WindowDrift
from monitoring.profile import ReferenceProfile
from monitoring.scored import Window

NUM_LABELLED = "drift/num_labelled"
_OF_LABELS = {
    f"drift/performance/{name}" for name in ("accuracy", "ece", "nll", "calibration_shift")
} | {NUM_LABELLED}


def measures_of(window: Window, drift: WindowDrift, only_labels: bool = False) -> dict[str, float]:
    """What the judgement found, and the mean of every numeric column: `drift/<column>/mean`.

    With `only_labels`, for labels that come later, what does not follow from labels is left out:
    the window has said it already.
    """
    found = drift.metrics() | {NUM_LABELLED: float(drift.num_labelled)}
    for one in window.table.schema:
        if one.name not in columns.ASIDE and columns.is_numeric(one.type):
            values = window.numbers(one.name)
            if (known := values[np.isfinite(values)]).size:
                found[f"drift/{one.name}/mean"] = float(known.mean())
    if only_labels:
        found = {key: value for key, value in found.items() if _is_of_labels(key)}
    return {key: value for key, value in found.items() if math.isfinite(value)}


def rows_behind(measures: Mapping[str, float], key: str, num_rows: int) -> float:
    """How many rows of a window a measure is about: those with a label, or all."""
    return measures.get(NUM_LABELLED, num_rows) if _is_of_labels(key) else num_rows


def _is_of_labels(key: str) -> bool:
    return key in _OF_LABELS or bool(columns.LABELLED & set(key.split("/")[1:2]))


def reference_measures(profile: ReferenceProfile, drift: WindowDrift) -> dict[str, float]:
    """The same of the reference, where it has them: what rules compare with."""
    means = {
        f"drift/{name}/mean": float(summary.mean)
        for name, summary in profile.numbers.items()
        if summary.count
    }
    quality = {
        f"drift/performance/{name}": estimate.reference
        for name, estimate in drift.performance.items()
        if estimate.reference is not None
    }
    return means | quality
