"""Draws plain numbers with matplotlib: `draw_*` fill given axes, `svg` and `png` make pictures.

Colours are Okabe and Ito's, told apart with any colour vision.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.axes import Axes

Draw = Callable[["Axes"], None]
Points = Sequence[tuple[float, float]]

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
_INK, _MUTED, _LINE = "#1f2933", "#5f6c7b", "#d9dee5"
_MAX_POINTS = 400
_MAX_MARKERS = 24
_NUM_HISTOGRAM_BINS = 24
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.left": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # names of data sets may hold a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "masklock",
    "figure.facecolor": "white",
}


# A legend that can cover nothing.
_ABOVE: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (-0.02, 1.0),
    "ncols": 2,
    "borderpad": 0.2,
    "handlelength": 1.4,
    "columnspacing": 1.4,
}


def draw_lines(axes: "Axes", lines: Mapping[str, Points], colours: Mapping[str, str]) -> None:
    """One line a name over the optimizer steps; few points get markers."""
    for name, points in lines.items():
        steps, values = zip(*_thinned(points), strict=True)
        label = name if len(lines) > 1 else None
        axes.plot(steps, values, color=colours[name], label=label)
        if len(steps) <= _MAX_MARKERS:
            for step, value in zip(steps, values, strict=True):
                tip = _tip(f"{name}, step {step:g}: {value:.4g}")
                axes.plot([step], [value], "o", color=colours[name], markersize=4, gid=tip)
    axes.set_xlabel("optimizer step")
    if len(lines) > 1:
        axes.legend(**_ABOVE)
    if all(value > 0 for points in lines.values() for _, value in points):
        _log_scale_if_wide(axes, [value for points in lines.values() for _, value in points])


def draw_windows(
    axes: "Axes",
    lines: Mapping[str, Points],
    colours: Mapping[str, str],
    level: float | None = None,
    level_name: str = "",
    log: bool = False,
) -> None:
    """One line a name over the windows of production, and the level that they are held against."""
    for name, points in lines.items():
        numbers, values = zip(*points, strict=True)
        axes.plot(numbers, values, color=colours[name], label=name)
        for number, value in points:
            tip = _tip(f"{name}, window {number:g}: {value:.4g}")
            axes.plot([number], [value], "o", color=colours[name], markersize=3.5, gid=tip)
    if level is not None:
        axes.axhline(level, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label=level_name)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(y=0.15)
    axes.set_xlabel("window")
    axes.locator_params(axis="x", integer=True)
    axes.legend(**_ABOVE)


def draw_timeline(
    axes: "Axes",
    windows: Sequence[int],
    events: Sequence[tuple[int, int, str]],
    levels: Sequence[str],
) -> None:
    """Every window as a tick, every event as a mark in the row of its level."""
    colours = (_MUTED, "#E69F00", ORANGE)
    axes.plot(windows, [-0.8] * len(windows), "|", color=_MUTED, markersize=6)
    for number, level, title in events:
        tip = _tip(f"window {number}, {levels[level]}: {title}")
        axes.plot([number], [level], "o", color=colours[level], markersize=8, gid=tip)
    axes.set_yticks(range(len(levels)), levels)
    axes.set(ylim=(-1.2, len(levels) - 0.5), xlabel="window")
    axes.locator_params(axis="x", integer=True)


def draw_reliability(axes: "Axes", bins: Sequence[Mapping[str, Any]], colour: str) -> None:
    """Accuracy by confidence. The hatched part is the gap to the diagonal; below, rows a bin."""
    filled = [row for row in bins if row.get("count") and row.get("accuracy") is not None]
    lower = np.array([row["lower"] for row in filled])
    width = np.array([row["upper"] for row in filled]) - lower
    accuracy = np.array([row["accuracy"] for row in filled])
    confidence = np.array([row["confidence"] for row in filled])
    count = np.array([row["count"] for row in filled])
    bars = axes.bar(lower, accuracy, width, align="edge", color=colour, **_BAR)
    gaps = axes.bar(lower, confidence - accuracy, width, accuracy, align="edge", **_GAP)
    for bar, gap, row in zip(bars, gaps, filled, strict=True):
        shares = f"confidence {row['confidence']:.3f}, accuracy {row['accuracy']:.3f}"
        bar.set_gid(_tip(f"{row['lower']:.2f} to {row['upper']:.2f}: {row['count']}, {shares}"))
        gap.set_gid(bar.get_gid())
    axes.bar(lower, 0.11 * count / count.max(), width, -0.14, align="edge", color="#b8c2cc")
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.axhline(0, color=_LINE, linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(-0.15, 1), xlabel="confidence", ylabel="accuracy")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])


_BAR: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.8}
_GAP: dict[str, Any] = {"facecolor": "none", "edgecolor": ORANGE, "hatch": "/////", "linewidth": 0}


def draw_histograms(axes: "Axes", groups: Mapping[str, np.ndarray]) -> None:
    """Shares of two groups over one measure, each group summing to 1."""
    values = np.concatenate(list(groups.values()))
    low, high = np.quantile(values, [0.005, 0.995]) if len(values) > 200 else (0, 0)
    low, high = (low, high) if high > low else (values.min(), max(values.max(), values.min() + 1))
    edges = np.linspace(low, high, _NUM_HISTOGRAM_BINS + 1)
    for (name, group), colour in zip(groups.items(), (BLUE, ORANGE), strict=False):
        share = np.histogram(np.clip(group, low, high), edges)[0] / len(group)
        axes.stairs(share, edges, fill=True, alpha=0.28, color=colour, gid=_tip(name))
        axes.stairs(share, edges, color=colour, linewidth=1.5, label=f"{name} ({len(group):,})")
    axes.set(ylabel="share of rows", ylim=(0, None))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.legend(**_ABOVE)


def draw_confusion(axes: "Axes", labels: Sequence[str], counts: np.ndarray) -> None:
    """Rows of each label (downwards) by prediction (to the right), as shares of the label."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [label if len(label) <= 12 else f"{label[:11]}…" for label in labels]
    axes.grid(False)
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = BLUE if row == column else ORANGE
        tip = _tip(f"{labels[row]} as {labels[column]}: {counts[row, column]}")
        where = ([column - 0.5, column + 0.5], row - 0.5, row + 0.5)
        strength = 0.12 + 0.88 * shares[row, column]
        axes.fill_between(*where, color=colour, alpha=strength, linewidth=0, gid=tip)
        if len(labels) <= 12:
            ink = "white" if strength > 0.6 else _INK
            number = f"{counts[row, column]}"
            axes.text(column, row, number, color=ink, ha="center", va="center", fontsize=7)
    places, edge = range(len(labels)), len(labels) - 0.5
    is_long = any(len(name) > 3 for name in names)
    axes.set_xticks(places, names, rotation=90 if is_long else 0, fontsize=7.5)
    axes.set_yticks(places, names, fontsize=7.5)
    axes.set(xlim=(-0.5, edge), ylim=(edge, -0.5), xlabel="prediction", ylabel="label")


def svg(draw: Draw, title: str, size: tuple[float, float] = (3.7, 2.7)) -> str:
    """An `<svg>` element for a page, the same for the same numbers; the title is its tooltip."""
    text = _rendered([draw], "svg", size).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r'<g id="(?!m[0-9a-f])[^"]*"', "<g", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    size_attributes = re.compile(r' (?:width|height)="[\d.]+pt"')
    head, body = text.split(">", 1)
    head = f'{size_attributes.sub("", head)} role="img" class="chart">'
    return f"{head}<title>{escape(title)}</title>{body.strip()}"


def png(draws: Sequence[Draw], titles: Sequence[str]) -> bytes:
    """A PNG file with the charts side by side, each under its title."""
    return _rendered(draws, "png", (3.7 * len(draws), 2.9), titles)


def _rendered(
    draws: Sequence[Draw], kind: str, size: tuple[float, float], titles: Sequence[str] = ()
) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # Other scripts are drawn by the reader's own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(draws), squeeze=False)[0]
        for axes, draw in zip(panels, draws, strict=True):
            draw(axes)
        for axes, title in zip(panels, titles, strict=False):
            axes.set_title(title, fontsize=10, loc="left")
        no_date = {"Date": None} if kind == "svg" else {}
        figure.savefig(file, format=kind, dpi=160, metadata=no_date)
    return file.getvalue()


def _tip(text: str) -> str:
    """An id from which `svg` makes a tooltip."""
    return f"tip:{text}"


def _thinned(points: Points) -> Points:
    """At most `_MAX_POINTS` points: means of equal runs of neighbours."""
    if len(points) <= _MAX_POINTS:
        return points
    groups = np.array_split(np.asarray(points, dtype=float), _MAX_POINTS)
    return [(float(step), float(value)) for step, value in (group.mean(axis=0) for group in groups)]


def _log_scale_if_wide(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic axis where values span more than a factor of 50 (perplexity)."""
    if min(values) * 50 < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
