"""What a tracker shows of one judged window: a row of numbers, curves, the newest alerts."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from monitoring.alerts import Alert
from monitoring.dashboards.evaluation import MEASURES
from monitoring.profile import ReferenceProfile
from monitoring.scored import Window
from monitoring.words import sentence_title
from pipeline.exhibits import MAX_ROWS, Curve, Table
from pipeline.metric_names import OOD_SCORES, UNCERTAINTIES

MAX_BINS = 50
_ALERT_COLUMNS = ("created", "severity", "rule", "column", "title", "state", "id")


def window_row(measures: Mapping[str, float], num_alerts: int) -> dict[str, float]:
    """One row: every measure of the window, and the means under the names of the evaluation.

    `uncertainty/<measure>` is here the mean over the window's rows, as it is the mean over the test
    rows in the evaluation: the two can be laid side by side.
    """
    row = {"monitor/num_alerts": float(num_alerts), **measures}
    for name in UNCERTAINTIES:
        row |= _renamed(measures, f"drift/{name}/mean", f"uncertainty/{name}")
    for name in OOD_SCORES:
        row |= _renamed(measures, f"drift/{name}/mean", f"ood/{name}_mean")
    return row


def window_curves(profile: ReferenceProfile, window: Window) -> dict[str, Curve]:
    """The measures of trust in the window beside the reference, on the profile's own bins."""
    curves = {}
    for name in MEASURES:
        summary = profile.numbers.get(name)
        if summary is None or not summary.count or not window.has(name):
            continue
        counts = {
            "reference": summary.counts,
            "this window": type(summary).of(window.numbers(name), summary.grid).counts,
        }
        curve = Curve(sentence_title(name), name, _shares(counts, summary.edges))
        curves[f"drift/{name}_histogram"] = curve
    return curves


def alert_table(alerts: Iterable[Alert]) -> Table:
    """The newest alerts, the newest first."""
    newest = sorted(alerts, key=lambda alert: (alert.created, alert.id), reverse=True)[:MAX_ROWS]
    rows = [[getattr(alert, column) for column in _ALERT_COLUMNS] for alert in newest]
    return Table(_ALERT_COLUMNS, rows)


def _renamed(measures: Mapping[str, float], there: str, here: str) -> dict[str, float]:
    return {here: measures[there]} if there in measures else {}


def _shares(
    counts: Mapping[str, NDArray[np.int64]], edges: NDArray[np.float64]
) -> dict[str, Sequence[tuple[float, float]]]:
    """Share of rows by the upper end of each bin, over the bins that are in use; few and equal."""
    used = np.flatnonzero(sum(counts.values()))
    first, last = int(used[0]), int(used[-1]) + 1
    width = -(-(last - first) // MAX_BINS)
    starts = np.arange(first, last, width)
    ends = edges[np.minimum(starts + width, last)]
    lines: dict[str, Sequence[tuple[float, float]]] = {}
    for name, values in counts.items():
        sums = np.add.reduceat(values[:last], starts) / max(values.sum(), 1)
        points = zip(ends.tolist(), sums.tolist(), strict=True)
        lines[name] = [point for point in points if np.isfinite(point[0])]
    return lines
