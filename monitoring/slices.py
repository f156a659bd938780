"""Slices of paired rows: by length, label, prediction and domain."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from monitoring.paired_rows import Pair

MINIMUM_ROWS = 20
_BY_VALUE = {"label": "label", "prediction": "predicted", "domain": "domain"}
_MANY = 50

Mask = NDArray[np.bool_]


def slices_of(pair: Pair, minimum_rows: int = MINIMUM_ROWS) -> dict[str, Mask]:
    """Rows by name of the slice, [N] each; slices with few rows are left out.

    `length=0-41` counts tokens, or characters where tokens were not counted; `predicted=` is what
    the first run predicted.
    """
    found = {**dict(_by_value(pair)), **dict(_by_length(pair))}
    return {name: mask for name, mask in found.items() if minimum_rows <= mask.sum() < len(mask)}


def _by_value(pair: Pair) -> Iterator[tuple[str, Mask]]:
    for column, word in _BY_VALUE.items():
        if column in pair.a.column_names:
            values = np.array(pair.a[column].to_pylist(), dtype=object)
            known = sorted({value for value in values if isinstance(value, str)})
            for value in known[:_MANY]:
                yield f"{word}={value}", values == value


def _by_length(pair: Pair) -> Iterator[tuple[str, Mask]]:
    if "num_tokens" in pair.a.column_names:
        lengths = np.asarray(pair.a["num_tokens"].to_numpy(), dtype=np.float64)
    else:
        lengths = np.array([len(text or "") for text in pair.a["text"].to_pylist()], np.float64)
    cuts = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1], method="inverted_cdf"))
    for place, (lower, upper) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        above = lengths >= lower if place == 0 else lengths > lower
        first = lower if place == 0 else lower + 1
        yield f"length={first:.0f}-{upper:.0f}", above & (lengths <= upper)
