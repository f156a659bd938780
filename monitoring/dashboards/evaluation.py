"""What a tracker shows of an evaluated run: pictures, binned curves and the most uncertain rows.

Curves are made of bins, never of one point a row: charts that sample their points would lie.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitoring.figures import save_figures
from monitoring.run import Run, is_number, load_run
from monitoring.words import WAYS, sentence_title, title_of
from pipeline.exhibits import MAX_ROWS, Curve, Exhibit, Picture, Table
from pipeline.records import RunFolder

NUM_BINS = 30
MEASURES = ("predictive_entropy", "mutual_information", "confidence", "perplexity")
_ROW_COLUMNS = (
    *("sample_id", "text", "label", "prediction", "correct", "confidence", "log_probability"),
    *("perplexity", "predictive_entropy", "mutual_information", "disagreement"),
)
_MAX_LETTERS = 500

FloatArray = NDArray[np.float64]


def evaluation_exhibits(folder: RunFolder) -> dict[str, Exhibit]:
    """Everything to show of the run in this folder, by name; draws the pictures into it."""
    run = load_run(folder)
    pictures = {f"figures/{name}": Picture(png) for name, png in save_figures(folder).items()}
    return {**pictures, **reliability(run), **uncertainty(run), **separation(run), **doubtful(run)}


def reliability(run: Run) -> dict[str, Curve]:
    """Accuracy by confidence, a line for each way of predicting, with the diagonal."""
    lines: dict[str, Sequence[tuple[float, float]]] = {}
    for way, title in WAYS.items():
        bins = (run.section("calibration").get(way) or {}).get("reliability") or []
        points = [(row["confidence"], row["accuracy"]) for row in bins if row.get("count")]
        if points := [point for point in points if all(map(is_number, point))]:
            lines[title] = points
    if not lines:
        return {}
    lines["Perfect"] = [(0.0, 0.0), (1.0, 1.0)]
    return {"calibration/reliability": Curve("Accuracy by confidence", "confidence", lines)}


def uncertainty(run: Run) -> dict[str, Curve]:
    """Each measure for right and wrong answers of the test rows; for all where none is known."""
    test, curves = run.samples_of("test"), {}
    names = {True: "right", False: "wrong", None: "test"}
    for measure in MEASURES:
        groups = {
            name: _finite([row.get(measure) for row in test if row.get("correct") is correct])
            for correct, name in names.items()
        }
        if groups := {name: values for name, values in groups.items() if len(values)}:
            curve = histogram(sentence_title(measure), measure, groups)
            curves[f"uncertainty/{measure}_histogram"] = curve
    return curves


def separation(run: Run) -> dict[str, Curve]:
    """The score that is best over all sets, for the test rows and the rows of each set."""
    scores = _common_scores(run.section("ood"))
    if not scores:
        return {}
    best = max(scores, key=lambda name: scores[name])
    splits = {"test": "test", **{name: f"ood:{name}" for name in run.section("ood")}}
    groups = {
        group: _finite([row.get(best) for row in run.samples_of(split)])
        for group, split in splits.items()
    }
    known = {group: values for group, values in groups.items() if len(values)}
    if len(known) < 2:
        return {}
    return {"ood/best_score_histogram": histogram(title_of(best), best, known)}


def _common_scores(sets: Mapping[str, Any]) -> dict[str, float]:
    """Sum of the AUROC over the sets, of every score that all of them have."""
    tables = [section["scores"] for section in sets.values()]
    names = set.intersection(*(set(table) for table in tables)) if tables else set()
    return {name: sum(table[name]["auroc"] for table in tables) for name in sorted(names)}


def doubtful(run: Run) -> dict[str, Table]:
    """The test rows with the greatest predictive entropy (perplexity for generated text)."""
    rows = run.samples_of("test")
    by = next((c for c in ("predictive_entropy", "perplexity") if rows and c in rows[0]), None)
    if by is None:
        return {}
    known = [row for row in rows if is_number(row.get(by))]
    first = sorted(known, key=lambda row: (-row[by], row["sample_id"]))[:MAX_ROWS]
    columns = [column for column in _ROW_COLUMNS if column in rows[0]]
    cells = [[_shortened(row[column]) for column in columns] for row in first]
    return {"uncertainty/most_uncertain": Table(columns, cells)}


def histogram(title: str, x: str, groups: Mapping[str, FloatArray]) -> Curve:
    """Share of each group's values [N] in bins of one width over the range of all."""
    together = np.concatenate(list(groups.values()))
    edges = np.histogram_bin_edges(together, bins=NUM_BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    lines = {
        name: list(zip(middles.tolist(), _shares(values, edges), strict=True))
        for name, values in groups.items()
    }
    return Curve(title, x, lines)


def _shares(values: FloatArray, edges: FloatArray) -> list[float]:
    shares: list[float] = (np.histogram(values, edges)[0] / max(len(values), 1)).tolist()
    return shares


def _finite(values: Sequence[Any]) -> FloatArray:
    return np.array([value for value in values if is_number(value)], dtype=np.float64)


def _shortened(value: Any) -> Any:
    is_long = isinstance(value, str) and len(value) > _MAX_LETTERS
    return value[: _MAX_LETTERS - 1] + "…" if is_long else value
