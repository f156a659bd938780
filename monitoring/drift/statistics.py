"""Two-sample tests of one column, scipy's where it has them: a new one is a function and a line.

Each takes the reference and the window, and gives a statistic, a p-value where there is a test, and
an effect: a size of the change that does not grow with the number of rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import jensenshannon

from monitoring.drift.permutations import permuted_members, share_at_least

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_SMALLEST_EXPECTED = 5  # Cochran's rule for the chi2 approximation
_NUM_TABLES = 4999
_NUM_PERMUTATIONS = 999


@dataclass(frozen=True)
class TestResult:
    """One test of one column. `p_value` is None for a distance without a test."""

    statistic: float
    p_value: float | None
    effect: float

    __test__ = False  # not a test of pytest's


@dataclass(frozen=True)
class DriftTest:
    """A test, and the smallest effect that counts for it.

    `run` takes the values [n] and [m] of a numeric column without NaN, or with `on_counts` the
    counts [K] and [K] of the same categories or bins. `decides`: it has a p-value.
    """

    run: Callable[[NDArray[Any], NDArray[Any]], TestResult]
    min_effect: float
    on_counts: bool = False
    decides: bool = False


def kolmogorov_smirnov(reference: FloatArray, window: FloatArray) -> TestResult:
    """Largest distance of the distribution functions; the p-value is conservative under ties."""
    found = stats.ks_2samp(reference, window, method="asymp")
    return TestResult(float(found.statistic), float(found.pvalue), float(found.statistic))


def cramer_von_mises(reference: FloatArray, window: FloatArray) -> TestResult:
    """Anderson's two-sample T; effect: root mean square distance of the distribution functions.

    T = n m / (n + m)^2 * sum over the pooled rows of (F - G)^2 (Anderson, Annals of Mathematical
    Statistics 1962), so the mean square is T (n + m) / (n m). Where rows are tied, its distribution
    without change is another (and scipy's T is wrong): the p-value comes from permutations then.
    """
    n, m = len(reference), len(window)
    pooled = np.concatenate([reference, window])
    num_tied = np.unique(pooled, return_counts=True)[1]
    tied = len(num_tied) < n + m
    members = permuted_members(n, m, _NUM_PERMUTATIONS if tied else 0, seed=0)
    ends = num_tied.cumsum()
    below = members[np.argsort(pooled)].cumsum(axis=0, dtype=np.float64)[ends - 1]
    squares = (below / n - (ends[:, None] - below) / m) ** 2
    mean_squares = num_tied @ squares / (n + m)
    if tied:
        p_value = share_at_least(mean_squares)
    else:
        p_value = float(stats.cramervonmises_2samp(reference, window, method="asymptotic").pvalue)
    statistic = float(mean_squares[0]) * n * m / (n + m)
    return TestResult(statistic, p_value, float(np.sqrt(mean_squares[0])))


def tails(reference: FloatArray, window: FloatArray) -> TestResult:
    """Rows outside the middle 90 % of the reference: a few rows that do not belong.

    Chi2 of the counts below, inside and above; effect: the larger change of a tail's share.
    """
    low, high = np.quantile(reference, [0.05, 0.95], method="inverted_cdf")
    before, after = (
        np.array([(side < low).sum(), ((low <= side) & (side <= high)).sum(), (side > high).sum()])
        for side in (reference, window)
    )
    found = chi2(before, after)
    changes = np.abs(after / len(window) - before / len(reference))
    return TestResult(found.statistic, found.p_value, float(max(changes[0], changes[2])))


def wasserstein(reference: FloatArray, window: FloatArray) -> TestResult:
    """Area between the distribution functions; effect: in standard deviations of all rows."""
    distance = float(stats.wasserstein_distance(reference, window))
    pooled = np.concatenate([reference, window])
    scale = float(np.abs(pooled).max()) or 1.0  # squares of huge values would overflow
    spread = float((pooled / scale).std())
    return TestResult(distance, None, distance / scale / spread if spread > 0 else 0.0)


def chi2(reference: IntArray, window: IntArray) -> TestResult:
    """Pearson's test of equal proportions; effect: Cohen's w = sqrt(chi2 (n + m) / (n m)).

    Where a count expected is below 5 the p-value comes from 4,999 tables with the same margins
    instead (seeded): labels of many classes are sparse in any window.
    """
    table = np.stack([reference, window])[:, reference + window > 0]
    n, m = table.sum(axis=1)
    if table.shape[1] < 2:
        return TestResult(0.0, 1.0, 0.0)
    statistic, p_value, _, expected = stats.chi2_contingency(table, correction=False)
    if expected.min() < _SMALLEST_EXPECTED:
        p_value = _p_value_of_margins(table)
    effect = np.sqrt(statistic * (n + m) / (n * m))
    return TestResult(float(statistic), float(p_value), float(effect))


def population_stability(reference: IntArray, window: IntArray) -> TestResult:
    """PSI = sum (w - r) log(w / r); each count half a row larger, so that no share is 0.

    Lewis, "An Introduction to Credit Scoring", 1994. Without change its mean is about
    (bins - 1) (1 / n + 1 / m): small windows look unstable.
    """
    r, w = _shares(reference + 0.5), _shares(window + 0.5)
    index = float(((w - r) * np.log(w / r)).sum())
    return TestResult(index, None, index)


def jensen_shannon(reference: IntArray, window: IntArray) -> TestResult:
    """Square root of the Jensen-Shannon divergence in bits: 0 equal, 1 disjoint."""
    distance = float(jensenshannon(_shares(reference), _shares(window), base=2))
    return TestResult(distance, None, distance)


TESTS: Mapping[str, DriftTest] = {
    "ks": DriftTest(kolmogorov_smirnov, 0.05, decides=True),
    "cramer_von_mises": DriftTest(cramer_von_mises, 0.03, decides=True),
    "tails": DriftTest(tails, 0.03, decides=True),
    "wasserstein": DriftTest(wasserstein, 0.1),
    "chi2": DriftTest(chi2, 0.1, on_counts=True, decides=True),
    "psi": DriftTest(population_stability, 0.1, on_counts=True),
    "jensen_shannon": DriftTest(jensen_shannon, 0.1, on_counts=True),
}


def _shares(counts: NDArray[np.generic]) -> FloatArray:
    return np.asarray(counts / counts.sum(), dtype=np.float64)


def _p_value_of_margins(table: IntArray) -> float:
    """Share of tables with these margins that are at least as far from equal proportions.

    With the margins fixed chi2 = N^2 / (n m) sum_k w_k^2 / c_k - N m / n, c the pooled counts, so
    only the sum has to be compared.
    """
    pooled, size = table.sum(axis=0), int(table[1].sum())
    generator = np.random.Generator(np.random.Philox(0))
    drawn = generator.multivariate_hypergeometric(pooled, size, _NUM_TABLES, method="marginals")
    return share_at_least((np.concatenate([table[1:], drawn]) ** 2 / pooled).sum(axis=1))
