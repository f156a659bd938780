"""The numbers of one window, by the keys that rules, dashboards and the history know them by."""

import math
from collections.abc import Mapping

import numpy as np

from monitoring import columns
from monitoring.drift import WindowDrift
from monitoring.profile import ReferenceProfile
from monitoring.scored import Window

NUM_LABELLED = "drift/num_labelled"
_QUALITY = "drift/performance/"
_WITHOUT_LABELS = f"{_QUALITY}estimated_accuracy"


def measures_of(window: Window, drift: WindowDrift, only_labels: bool = False) -> dict[str, float]:
    """What the judgement found, and the mean of every numeric column: `drift/<column>/mean`.

    Measures of quality come with the ends of their intervals: `drift/performance/accuracy`,
    `..._lower` and `..._upper`. A rule about an end asks for more than bad luck.

    With `only_labels`, for labels that come later, what does not follow from labels is left out:
    the window has said it already.
    """
    found = drift.metrics() | {NUM_LABELLED: float(drift.num_labelled)}
    for name, estimate in drift.performance.items():
        found[f"{_QUALITY}{name}_lower"] = estimate.lower
        found[f"{_QUALITY}{name}_upper"] = estimate.upper
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
    is_quality = key.startswith(_QUALITY) and not key.startswith(_WITHOUT_LABELS)
    is_column = bool(columns.LABELLED & set(key.split("/")[1:2]))
    return key == NUM_LABELLED or is_quality or is_column


def reference_measures(profile: ReferenceProfile, drift: WindowDrift) -> dict[str, float]:
    """The same of the reference, where it has them: what rules compare with."""
    means = {
        f"drift/{name}/mean": float(summary.mean)
        for name, summary in profile.numbers.items()
        if summary.count
    }
    quality = {
        f"{_QUALITY}{name}{end}": estimate.reference
        for name, estimate in drift.performance.items()
        if estimate.reference is not None
        for end in ("", "_lower", "_upper")
    }
    return means | quality
