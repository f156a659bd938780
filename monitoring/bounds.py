"""Columns as scores in [0, 1], with bounds on the mean they have while nothing changes.

What an e-detector needs from the reference rows. The bounds fail with probability `error` over the
draw of the reference rows, each side on its own; they hold for any distribution.

    value    the column itself, which lies in [0, 1]: a betting bound from the reference rows
    rank     share of reference rows below, ties half: for changes anywhere in the distribution
    tail     1 above the (1 - tail) quantile of the reference: for a few rows that do not belong
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import beta

from pipeline.errors import DataError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class BoundedScore:
    """How a column becomes a score, and what is known of its mean without change.

    `lower` and `upper` bound that mean, `spread` is the score's standard deviation.
    """

    transform: Callable[[FloatArray], FloatArray]
    lower: float
    upper: float
    spread: float

    def of(self, values: ArrayLike) -> FloatArray:
        """Scores [N] in [0, 1] of a window's values [N]."""
        return self.transform(_vector(values, "The window"))


def value_score(reference: ArrayLike, error: float = 0.01) -> BoundedScore:
    """The column as it is; reference rows [n] in an order that tells nothing."""
    rows = _vector(reference, "The reference")
    return BoundedScore(
        transform=lambda values: values,
        lower=1 - upper_mean_bound(1 - rows, error),
        upper=upper_mean_bound(rows, error),
        spread=float(rows.std()),
    )


def rank_score(reference: ArrayLike, error: float = 0.01) -> BoundedScore:
    """Share of reference rows below a value, ties counted half.

    Given the reference rows r_1..r_n, the mean rank of a new row X is the mean of n independent
    values P(X > r_i) + P(X = r_i) / 2, each the conditional mean of a uniform value. Centred, a
    uniform value has E exp(t U) = sinh(t / 2) / (t / 2) <= exp(t^2 / 24), so the mean leaves 1/2 by
    more than sqrt(log(1 / error) / (6 n)) with a probability of at most `error` on each side.
    """
    rows = np.sort(_vector(reference, "The reference"))
    margin = min(0.5, math.sqrt(math.log(1 / error) / (6 * len(rows))))
    return BoundedScore(
        transform=lambda values: (
            (np.searchsorted(rows, values, "left") + np.searchsorted(rows, values, "right"))
            / (2 * len(rows))
        ),
        lower=0.5 - margin,
        upper=0.5 + margin,
        spread=math.sqrt(1 / 12),
    )


def tail_score(reference: ArrayLike, error: float = 0.01, tail: float = 0.05) -> BoundedScore:
    """1 for a value above the (n - k)-th smallest of n reference rows, k = tail * n, else 0.

    For a continuous column P(X > r_(n-k)) has the distribution Beta(k + 1, n - k) over the draw of
    the reference (order statistics of uniform values), which gives the bounds exactly; ties make
    the chance of 1 smaller, so that `upper` holds with them and `lower` without.
    """
    rows = np.sort(_vector(reference, "The reference"))
    num_above = int(tail * len(rows))
    threshold = rows[len(rows) - num_above - 1]
    chance = beta(num_above + 1, len(rows) - num_above)
    mean = float(chance.mean())
    return BoundedScore(
        transform=lambda values: (values > threshold).astype(np.float64),
        lower=float(chance.ppf(error)),
        upper=float(chance.ppf(1 - error)),
        spread=math.sqrt(mean * (1 - mean)),
    )


SCORES: Mapping[str, Callable[..., BoundedScore]] = {
    "value": value_score,
    "rank": rank_score,
    "tail": tail_score,
}


def upper_mean_bound(values: ArrayLike, error: float = 0.01) -> float:
    """Upper confidence bound on the mean of rows [n] in [0, 1], from bets against every mean m.

    log K(m) = sum_i log(1 + l_i (m - x_i)), with l_i > 0 chosen from the rows before i, grows with
    m. For the true mean K has an expectation of 1, so that K >= 1 / error happens with a chance of
    at most `error` (Markov): the bound is the m where K(m) = 1 / error. With v the variance so far,
    l_i = sqrt(2 log(1 / error) / (n v_{i-1})), at most 3/4. Waudby-Smith & Ramdas, "Estimating
    means of bounded random variables by betting", JRSS-B 2024, section 4
    (github.com/gostevehoward/confseq).
    """
    x = _vector(values, "The reference")
    if not ((x >= 0) & (x <= 1)).all():
        raise DataError(
            f"The bound on a mean takes values between 0 and 1; found {x.min()} to {x.max()}. "
            "Take the score `rank` or `tail` for this column."
        )
    counts = np.arange(1, len(x) + 1)
    means = (0.5 + np.cumsum(x)) / (counts + 1)
    variances = (0.25 + np.cumsum((x - means) ** 2)) / (counts + 1)
    before = np.concatenate([[0.25], variances[:-1]])
    bets = np.minimum(np.sqrt(2 * math.log(1 / error) / (len(x) * before)), 0.75)

    def log_capital(mean: float) -> float:
        return float(np.log1p(bets * (mean - x)).sum()) - math.log(1 / error)

    if log_capital(1.0) <= 0:
        return 1.0
    return float(brentq(log_capital, 0.0, 1.0))


def _vector(values: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or np.isnan(array).any():
        raise DataError(
            f"{name} needs at least one row and one number in each, none of them NaN; got shape "
            f"{array.shape} with {int(np.isnan(array).sum())} NaN. Leave those rows out first."
        )
    return array
