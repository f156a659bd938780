"""Charts of production, by window: alerts, detectors, quality, means beside the reference's."""

from collections.abc import Mapping, Sequence
from functools import partial

from monitoring import drawing
from monitoring.alerts import Alert
from monitoring.drawing import BLUE, GREEN, ORANGE, PURPLE
from monitoring.figures import Chart
from monitoring.history import WindowRecord
from monitoring.words import title_of
from pipeline.config.monitoring import SEVERITIES

RANK = {severity: place for place, severity in enumerate(SEVERITIES)}
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#5f6c7b", "#E69F00")
_DETECTOR = "drift/sequential/"
_QUALITY = "drift/performance/"


def timeline(windows: Sequence[WindowRecord], alerts: Sequence[Alert]) -> list[Chart]:
    """Which windows raised which alerts."""
    number = {window.sha256: window.id or 0 for window in windows}
    raised = [
        (number[alert.window["sha256"]], RANK[alert.severity], alert.title)
        for alert in alerts
        if alert.window.get("sha256") in number
    ]
    draw = partial(
        drawing.draw_timeline, windows=_numbers(windows), events=raised, levels=SEVERITIES
    )
    return [Chart("Alerts by window", draw, (11.6, 1.7))]


def detector_charts(windows: Sequence[WindowRecord]) -> list[Chart]:
    """Statistics of the e-detectors, of their thresholds: an alarm at 1."""
    lines = {
        title_of(name.removeprefix(_DETECTOR)): points
        for name in _names(windows, _DETECTOR)
        if (points := _points(windows, name))
    }
    return _lines("Evidence of change, of the alarm's threshold", lines, 1.0, "alarm", log=True)


def quality_charts(windows: Sequence[WindowRecord]) -> list[Chart]:
    """Accuracy with labels and estimated without; calibration error."""
    charts = []
    shown = {
        "Accuracy": {"with labels": "accuracy", "estimated": "estimated_accuracy"},
        "Calibration error (ECE)": {"with labels": "ece"},
    }
    for title, measures in shown.items():
        lines = {
            name: points
            for name, measure in measures.items()
            if (points := _points(windows, _QUALITY + measure))
        }
        reference = _reference_quality(windows, list(measures.values()))
        charts += _lines(title, lines, reference, "reference")
    return charts


def mean_charts(
    windows: Sequence[WindowRecord], columns: Sequence[str], means: Mapping[str, float]
) -> list[Chart]:
    """The mean of a column in each window, beside that of the reference."""
    charts = []
    for name in dict.fromkeys(columns):
        points = _points(windows, f"drift/{name}/mean")
        title = f"{title_of(name)}, mean"
        charts += _lines(
            title, {"production": points} if points else {}, means.get(name), "reference"
        )
    return charts


def _lines(
    title: str,
    lines: Mapping[str, drawing.Points],
    level: float | None,
    level_name: str,
    log: bool = False,
) -> list[Chart]:
    if not lines:
        return []
    colours = dict(zip(lines, _COLOURS * len(lines), strict=False))
    draw = partial(
        drawing.draw_windows,
        lines=lines,
        colours=colours,
        level=level,
        level_name=level_name,
        log=log,
    )
    return [Chart(title, draw)]


def _points(windows: Sequence[WindowRecord], measure: str) -> list[tuple[float, float]]:
    return [(w.id or 0, w.measures[measure]) for w in windows if measure in w.measures]


def _names(windows: Sequence[WindowRecord], prefix: str) -> list[str]:
    return sorted({name for w in windows for name in w.measures if name.startswith(prefix)})


def _numbers(windows: Sequence[WindowRecord]) -> list[int]:
    return [window.id or 0 for window in windows]


def _reference_quality(windows: Sequence[WindowRecord], measures: list[str]) -> float | None:
    for window in reversed(windows):
        for measure in measures:
            found = window.details.get("performance", {}).get(measure) or {}
            if found.get("reference") is not None:
                return float(found["reference"])
    return None
