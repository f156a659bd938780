"""Maximum mean discrepancy of embeddings, with all its permutations in one matrix product.

Gretton et al., "A Kernel Two-Sample Test", JMLR 2012. Rows x_1..x_n (reference), y_1..y_m (window),
kernel k(a, b) = exp(-|a - b|^2 / (2 h^2)), h the median distance of reference rows:

    MMD^2 = sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1))
            - 2 sum_{i, j} k(x_i, y_j) / (n m)

A permutation is a 0/1 column z over the pooled rows: with K the kernel matrix without its diagonal,
z'Kz, z'K1 and 1'K1 give all three sums, so P permutations are the one product K Z.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from monitoring.drift.permutations import permuted_members, share_at_least
from monitoring.drift.statistics import TestResult

FloatArray = NDArray[np.float64]
MIN_EFFECT = 0.03
AT_ONCE = 1000
_FEW = 10  # the observed division and nine permutations
_MAX_ROWS_FOR_BANDWIDTH = 1000


def mmd(
    reference: NDArray[np.floating],
    window: NDArray[np.floating],
    *,
    num_permutations: int,
    seed: int,
    bandwidth: float | None = None,
) -> TestResult:
    """Unbiased MMD^2 of embeddings [n, D] and [m, D], n and m at least 2.

    The p-value is (1 + permutations at least as far) / (1 + permutations); the effect is the
    MMD itself, sqrt(max(0, MMD^2)), between 0 and sqrt(2). Where fewer than 10 of the first 1,000
    permutations are as far, all are drawn: only a small p-value has to be known finely, and one
    that is small at both looks is small at the second alone, so that it stays valid.
    """
    kernel = gaussian_kernel(
        np.concatenate([reference, window]), bandwidth or median_distance(reference)
    )

    def squares(count: int, seed: int) -> FloatArray:
        members = permuted_members(len(reference), len(window), count, seed)
        return mmd_of_members(kernel, members, len(reference))

    found = squares(min(num_permutations, AT_ONCE), seed)
    starts = range(AT_ONCE, num_permutations, AT_ONCE)
    if starts and share_at_least(found) <= _FEW / (1 + AT_ONCE):
        more = [squares(min(AT_ONCE, num_permutations - start), seed + start) for start in starts]
        found = np.concatenate([found, *(part[1:] for part in more)])
    return TestResult(float(found[0]), share_at_least(found), float(np.sqrt(max(found[0], 0.0))))


def median_distance(rows: NDArray[np.floating]) -> float:
    """Median distance between rows [N, D], of the first 1,000; 1 where all are equal."""
    found = float(np.median(pdist(np.asarray(rows[:_MAX_ROWS_FOR_BANDWIDTH], dtype=np.float64))))
    return found if found > 0 else 1.0


def gaussian_kernel(rows: NDArray[np.floating], bandwidth: float) -> NDArray[np.float32]:
    """exp(-|a - b|^2 / (2 bandwidth^2)) for all pairs of rows [N, D], its diagonal 0."""
    scaled = (rows / (np.sqrt(2) * bandwidth)).astype(np.float32)
    scaled -= scaled.mean(axis=0)  # distances stay, rounding shrinks
    squares = np.einsum("nd,nd->n", scaled, scaled)
    kernel = 2 * (scaled @ scaled.T)
    kernel -= squares[:, None]
    kernel -= squares[None, :]
    np.exp(np.minimum(kernel, 0, out=kernel), out=kernel)
    np.fill_diagonal(kernel, 0)
    return np.asarray(kernel)


def mmd_of_members(kernel: NDArray[np.float32], members: NDArray[np.float32], n: int) -> FloatArray:
    """MMD^2 [columns] of every division of the rows into n and the others."""
    m = len(kernel) - n
    columns = np.concatenate([members, np.ones((n + m, 1), dtype=np.float32)], axis=1)
    product = kernel @ columns
    row_sums = product[:, -1].astype(np.float64)
    inside = (members * product[:, :-1]).sum(axis=0, dtype=np.float64)
    touching = row_sums @ members
    outside = row_sums.sum() - 2 * touching + inside
    between = touching - inside
    return np.asarray(
        inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2 * between / (n * m), dtype=np.float64
    )
