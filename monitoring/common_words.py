"""What the rows behind an alert have in common: words and lengths that the other rows lack.

Monroe, Colaresi, Quinn, "Fightin' Words", Political Analysis 2008: the log odds ratio of a word
between two groups under a Dirichlet prior made of all rows, over its standard deviation.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"[^\W\d_]{2,}")
_PRIOR_ROWS = 10.0  # how many rows' worth of the whole the prior weighs
MIN_ROWS = 3
MIN_Z = 2.5
LONGEST_WORD = 40


@dataclass(frozen=True)
class CommonWord:
    """A word that stands in more of the rows behind an alert than in the others."""

    word: str
    num_rows: int
    """Rows behind the alert that have it."""
    share: float
    """Of the rows behind the alert."""
    other_share: float
    """Of the other rows of the window."""
    z: float
    """Log odds ratio, in standard deviations."""


def common_words(behind: Sequence[str], others: Sequence[str], limit: int = 8) -> list[CommonWord]:
    """The words that tell the rows behind an alert [N] from the others [M], clearest first."""
    if not behind or not others:
        return []
    here, there = _rows_by_word(behind), _rows_by_word(others)
    whole = here + there
    weight = _PRIOR_ROWS / (len(behind) + len(others))
    found = []
    for word, count in here.items():
        if count < MIN_ROWS:
            continue
        z = _z(
            count + weight * whole[word] + 0.5,
            len(behind) + _PRIOR_ROWS + 1,
            there[word] + weight * whole[word] + 0.5,
            len(others) + _PRIOR_ROWS + 1,
        )
        if z >= MIN_Z:
            shares = count / len(behind), there[word] / len(others)
            found.append(CommonWord(word, count, *shares, z))
    return sorted(found, key=lambda one: (-one.z, one.word))[:limit]


def lengths(behind: Sequence[float], others: Sequence[float]) -> tuple[float, float] | None:
    """Median lengths of the rows behind an alert and of the others; None where either is empty."""
    if not len(behind) or not len(others):
        return None
    return float(np.median(behind)), float(np.median(others))


def _rows_by_word(texts: Sequence[str]) -> Counter[str]:
    """In how many rows each word stands: one long row counts once."""
    return Counter(
        word for text in texts for word in {w[:LONGEST_WORD] for w in _WORD.findall(text.lower())}
    )


def _z(rows: float, total: float, other_rows: float, other_total: float) -> float:
    ratio = math.log(rows / (total - rows)) - math.log(other_rows / (other_total - other_rows))
    return ratio / math.sqrt(1 / rows + 1 / other_rows)
