"""The numbers of one window, by the keys that rules, dashboards and the history know them by."""

import math

import numpy as np

from monitoring import columns
from monitoring.drift import WindowDrift
from monitoring.profile import ReferenceProfile
from monitoring.scored import Window

OF_LABELS = {
    f"drift/performance/{name}" for name in ("accuracy", "ece", "nll", "calibration_shift")
}


def measures_of(window: Window, drift: WindowDrift, only_labels: bool = False) -> dict[str, float]:
    """What the judgement found, and the mean of every numeric column: `drift/<column>/mean`.

    With `only_labels`, for labels that come later, what does not follow from labels is left out:
    the window has said it already.
    """
    found = drift.metrics()
    for one in window.table.schema:
        if one.name not in columns.ASIDE and columns.is_numeric(one.type):
            values = window.numbers(one.name)
            if (known := values[np.isfinite(values)]).size:
                found[f"drift/{one.name}/mean"] = float(known.mean())
    if only_labels:
        found = {key: value for key, value in found.items() if _is_of_labels(key)}
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _is_of_labels(key: str) -> bool:
    return key in OF_LABELS or key.split("/")[1] in columns.LABELLED


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
