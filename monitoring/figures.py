"""Which charts a run has: training curves, reliability, uncertainty, out-of-distribution scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from monitoring import drawing
from monitoring.classes import MAX_CLASSES, confusion
from monitoring.drawing import BLUE, GREEN, ORANGE, PURPLE, Draw
from monitoring.run import Run, is_number, load_run
from monitoring.words import WAYS, sentence_title, title_of
from pipeline.records import RunFolder, write_bytes

_COLOURS = {"deterministic": PURPLE, "mc": BLUE, "mc_temperature": GREEN}
_NOT_A_CURVE = ("train/epoch", "train/global_step", "train/loss", "eval/loss", "eval/epoch")
_MEASURES = ("predictive_entropy", "mutual_information", "confidence")


@dataclass(frozen=True)
class Chart:
    """A title, what draws it, and its width and height in inches."""

    title: str
    draw: Draw
    size: tuple[float, float] = (3.7, 2.7)

    @property
    def svg(self) -> str:
        """The chart as an `<svg>` element."""
        return drawing.svg(self.draw, self.title, self.size)


def curve_charts(run: Run) -> list[Chart]:
    """Losses in one chart, then each metric of evaluation during training, then the optimizer's."""
    losses = {
        name: points
        for name, key in (("training", "train/loss"), ("evaluation", "eval/loss"))
        if (points := run.history(key))
    }
    charts = []
    if losses:
        colours = {"training": BLUE, "evaluation": ORANGE}
        charts.append(Chart("Loss", partial(drawing.draw_lines, lines=losses, colours=colours)))
    for namespace, colour in (("eval/", ORANGE), ("train/", BLUE)):
        keys = [key for key in run.metric_keys(namespace) if key not in _NOT_A_CURVE]
        charts += [_curve(run, key, colour) for key in keys if _is_curve(run, key)]
    return charts


def _is_curve(run: Run, key: str) -> bool:
    """One point is no curve: figures of the evaluation stage have sections of their own."""
    return len({step for step, _ in run.history(key)}) > 1


def confusion_charts(run: Run) -> list[Chart]:
    """Which labels are taken for which, where there are few enough to be drawn."""
    labels, counts = confusion(run.samples_of("test"))
    if not 2 <= len(labels) <= MAX_CLASSES:
        return []
    return [Chart("Confusion", partial(drawing.draw_confusion, labels=labels, counts=counts))]


def reliability_charts(run: Run) -> list[Chart]:
    """One diagram for each way of predicting."""
    charts = []
    for way, title in WAYS.items():
        bins = (run.section("calibration").get(way) or {}).get("reliability") or []
        if any(row.get("count") and row.get("accuracy") is not None for row in bins):
            draw = partial(drawing.draw_reliability, bins=bins, colour=_COLOURS[way])
            charts.append(Chart(title, draw))
    return charts


def uncertainty_charts(run: Run) -> list[Chart]:
    """Each measure for right and wrong answers of the test rows."""
    test = run.samples_of("test")
    correct = [row.get("correct") for row in test]
    charts = []
    for measure in _MEASURES:
        groups = {
            name: _finite(
                [row.get(measure) for row, c in zip(test, correct, strict=True) if c is w]
            )
            for name, w in (("right", True), ("wrong", False))
        }
        charts += _histogram(sentence_title(measure), groups)
    return charts


def ood_charts(run: Run, name: str) -> list[Chart]:
    """Test rows against this set, by the best score, the best plain one and the best MC one."""
    entry = run.section("ood").get(name) or {}
    keys = ("best", "best_deterministic", "best_mc")
    scores: list[str] = list(dict.fromkeys(entry[key] for key in keys if entry.get(key)))
    inside, outside = run.samples_of("test"), run.samples_of(f"ood:{name}")
    charts = []
    for score in scores:
        column = score if any(score in row for row in inside) else score.removeprefix("mc_")
        groups = {
            "test": _finite([row.get(column) for row in inside]),
            _shortened(name): _finite([row.get(column) for row in outside]),
        }
        charts += _histogram(title_of(score), groups)
    return charts


def save_figures(folder: RunFolder) -> dict[str, Path]:
    """What the report shows as PNG files, by name, in `evaluation/figures/`."""
    run = load_run(folder)
    rows = {
        "curves": curve_charts(run),
        "confusion": confusion_charts(run),
        "reliability": reliability_charts(run),
        "uncertainty": uncertainty_charts(run),
    }
    rows |= {f"ood-{_file_name(name)}": ood_charts(run, name) for name in run.section("ood")}
    return {name: _save(folder, name, charts) for name, charts in rows.items() if charts}


def _save(folder: RunFolder, name: str, charts: Sequence[Chart]) -> Path:
    path = folder.evaluation / "figures" / f"{name}.png"
    write_bytes(path, drawing.png([chart.draw for chart in charts], [c.title for c in charts]))
    return path


def _curve(run: Run, key: str, colour: str) -> Chart:
    title = sentence_title(key.split("/", 1)[1])
    lines, colours = {title: run.history(key)}, {title: colour}
    return Chart(title, partial(drawing.draw_lines, lines=lines, colours=colours))


def _histogram(title: str, groups: dict[str, np.ndarray]) -> list[Chart]:
    if not all(len(group) for group in groups.values()):
        return []
    return [Chart(title, partial(drawing.draw_histograms, groups=groups))]


def _finite(values: Sequence[float | None]) -> np.ndarray:
    return np.array([value for value in values if is_number(value)], dtype=float)


def _shortened(name: str) -> str:
    """Fits above a chart. matplotlib would hide a label that begins with an underscore."""
    return (" " if name.startswith("_") else "") + (name if len(name) <= 24 else name[:23] + "…")


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
