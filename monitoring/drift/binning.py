"""Values and names as counts over the same bins, cut along the reference alone."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from monitoring.summaries import OTHER

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

NUM_BINS = 10


def binned(reference: FloatArray, window: FloatArray) -> tuple[IntArray, IntArray]:
    """Counts of both [K] over bins of the reference, values without NaN.

    Up to NUM_BINS different reference values: one bin each, one below all, between and above.
    More: bins between the reference's deciles, right-closed, equal deciles joined.
    """
    edges = np.unique(reference)
    if len(edges) > NUM_BINS:
        shares = np.arange(1, NUM_BINS) / NUM_BINS
        edges = np.unique(np.quantile(reference, shares, method="inverted_cdf"))
        places = [np.searchsorted(edges, values, "left") for values in (reference, window)]
    else:
        places = [
            np.searchsorted(edges, values, "left") + np.searchsorted(edges, values, "right")
            for values in (reference, window)
        ]
    num_bins = 2 * len(edges) + 1
    first, second = (np.bincount(place, minlength=num_bins) for place in places)
    return _occupied(first, second)


def category_counts(
    reference: Mapping[str, int], window: Iterable[str]
) -> tuple[IntArray, IntArray]:
    """Counts of both [K] over all names found in either, sorted.

    A reference of very many names counts the rest of them as one; names it does not know go there.
    """
    rest = OTHER in reference
    found = Counter(OTHER if rest and name not in reference else name for name in window)
    every = sorted(reference.keys() | found.keys())
    first, second = ([side.get(name, 0) for name in every] for side in (reference, found))
    return _occupied(np.array(first), np.array(second))


def _occupied(first: IntArray, second: IntArray) -> tuple[IntArray, IntArray]:
    kept = first + second > 0
    return first[kept], second[kept]
