"""The rows behind an alert: those that are most extreme in what it is about."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitoring import columns
from monitoring.profile import ReferenceProfile
from monitoring.scored import Window

FloatArray = NDArray[np.float64]


def extreme_rows(
    window: Window, profile: ReferenceProfile, column: str | None, limit: int
) -> list[dict[str, Any]]:
    """At most `limit` rows as `sample_id`, `place` in the window and `value`, most extreme first.

    Numbers: largest where the column's mean has risen above the reference's, else smallest.
    Names: rows of the names whose share grew most. Embeddings: furthest from the reference's mean.
    """
    if column is None or not window.has(column):
        return []
    weights, values = _weighed(window, profile, column)
    known = np.flatnonzero(np.isfinite(weights))
    places = known[np.argsort(-weights[known], kind="stable")][:limit].tolist()
    ids = window.table.column(columns.SAMPLE_ID).take(places).to_pylist()
    return [
        {"sample_id": sample, "place": place, "value": values[place]}
        for sample, place in zip(ids, places, strict=True)
    ]


def _weighed(
    window: Window, profile: ReferenceProfile, column: str
) -> tuple[FloatArray, Sequence[Any]]:
    """How extreme each row is, and what is shown for it."""
    if column == columns.EMBEDDING:
        distances = _distances(window, profile)
        return distances, distances.tolist()
    if columns.is_text(window.table.schema.field(column).type):
        return _growth_of_share(window, profile, column), window.texts(column)
    values = window.numbers(column)
    reference = profile.numbers.get(column)
    known = values[np.isfinite(values)]
    has_risen = reference is None or not known.size or known.mean() >= reference.mean
    return values if has_risen else -values, values.tolist()


def _distances(window: Window, profile: ReferenceProfile) -> FloatArray:
    embeddings, reference = window.embeddings(), profile.sample_embeddings()
    if embeddings is None or reference is None:
        return np.full(window.num_rows, np.nan)
    return np.asarray(np.linalg.norm(embeddings - reference.mean(axis=0), axis=1), dtype=np.float64)


def _growth_of_share(window: Window, profile: ReferenceProfile, column: str) -> FloatArray:
    texts = window.texts(column)
    names, counts = np.unique([text for text in texts if text is not None], return_counts=True)
    before = profile.categories.get(column, {})
    total = max(1, sum(before.values()))
    growth = {
        name: count / len(texts) - before.get(name, 0) / total
        for name, count in zip(names.tolist(), counts.tolist(), strict=True)
    }
    return np.array([np.nan if text is None else growth[text] for text in texts])
