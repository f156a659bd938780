"""Class by class: how well each label is found, and which are taken for which."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = Sequence[dict[str, Any]]

MAX_CLASSES = 20
"""More do not fit a table that is read, nor a picture: then the hardest are shown."""


@dataclass(frozen=True)
class ClassQuality:
    """One label over the test rows; a share without a row to count is None."""

    label: str
    num_rows: int
    precision: float | None
    recall: float | None
    f1: float
    taken_for: str
    """The wrong label that its rows got most often, with their number; empty if none did."""


def by_class(rows: Rows) -> list[ClassQuality]:
    """Every label among labels and predictions of labelled rows, in alphabetical order."""
    pairs = _pairs(rows)
    labels = sorted({name for pair in pairs for name in pair})
    of_label, of_prediction = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    both = Counter(pairs)
    return [_quality(label, of_label, of_prediction, both) for label in labels]


def hardest(classes: Sequence[ClassQuality]) -> list[ClassQuality]:
    """At most MAX_CLASSES, the lowest F1 first where there are more; else all, as they come."""
    if len(classes) <= MAX_CLASSES:
        return list(classes)
    return sorted(classes, key=lambda found: (found.f1, found.label))[:MAX_CLASSES]


def confusion(rows: Rows) -> tuple[list[str], NDArray[np.int64]]:
    """Labels, and how many rows of label i were predicted as label j, [C, C]."""
    pairs = _pairs(rows)
    labels = sorted({name for pair in pairs for name in pair})
    place = {label: number for number, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for label, prediction in pairs:
        counts[place[label], place[prediction]] += 1
    return labels, counts


def _pairs(rows: Rows) -> list[tuple[str, str]]:
    return [
        (str(row["label"]), str(row["prediction"]))
        for row in rows
        if row.get("label") is not None and row.get("prediction") is not None
    ]


def _quality(
    label: str,
    of_label: Counter[str],
    of_prediction: Counter[str],
    both: Counter[tuple[str, str]],
) -> ClassQuality:
    right, labelled, predicted = both[label, label], of_label[label], of_prediction[label]
    wrong = Counter({b: count for (a, b), count in both.items() if a == label != b})
    most = min(wrong.items(), key=lambda item: (-item[1], item[0]), default=None)
    return ClassQuality(
        label=label,
        num_rows=labelled,
        precision=right / predicted if predicted else None,
        recall=right / labelled if labelled else None,
        f1=2 * right / (labelled + predicted),
        taken_for=f"{most[0]} ({most[1]})" if most else "",
    )
