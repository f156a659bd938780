"""Divisions of pooled rows at random: what a test compares the observed division with."""

import numpy as np
from numpy.typing import NDArray


def permuted_members(n: int, m: int, num_permutations: int, seed: int) -> NDArray[np.float32]:
    """0/1 columns [n + m, 1 + P] saying which rows count as reference; the first as observed."""
    generator = np.random.Generator(np.random.Philox(seed))
    rows = np.zeros((1 + num_permutations, n + m), dtype=np.float32)
    rows[:, :n] = 1
    generator.permuted(rows[1:], axis=1, out=rows[1:])
    return np.ascontiguousarray(rows.T)


def share_at_least(values: NDArray[np.float64]) -> float:
    """The p-value of the first among all values: others at least as large, and itself.

    Those equal to the first but for rounding count as large.
    """
    slack = 1e-9 * abs(values[0])
    return float((values >= values[0] - slack).mean())
