"""Permutation test of MMD at n = m = 2,000 with 100 permutations: one product against gathering.

Run: python benchmarks/mmd.py. Both start from the same kernel matrix and the same permutations.
Gathering reorders the matrix by index for every permutation, as alibi-detect does. CPU time.
"""

import argparse
from statistics import median

import numpy as np
from _timing import cpu_seconds
from threadpoolctl import threadpool_limits

from monitoring.drift.embeddings import gaussian_kernel, median_distance, mmd, mmd_of_members
from monitoring.drift.permutations import permuted_members

NUM_ROWS, NUM_FEATURES, NUM_PERMUTATIONS, NUM_REPEATS = 2000, 384, 100, 3


def gathered(kernel: np.ndarray, members: np.ndarray) -> np.ndarray:
    """MMD^2 of every division, each from the matrix with its rows and columns reordered."""
    n, found = NUM_ROWS, []
    for column in members.T:
        order = np.concatenate([np.flatnonzero(column), np.flatnonzero(column == 0)])
        k = kernel[order][:, order]
        inside = float(k[:n, :n].sum()) + float(k[n:, n:].sum())
        found.append(inside / (n * (n - 1)) - 2 * float(k[:n, n:].mean()))
    return np.array(found)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    random = np.random.default_rng(0)
    reference = random.normal(size=(NUM_ROWS, NUM_FEATURES)).astype(np.float32)
    window = random.normal(0.02, size=(NUM_ROWS, NUM_FEATURES)).astype(np.float32)
    kernel = gaussian_kernel(np.concatenate([reference, window]), median_distance(reference))
    members = permuted_members(NUM_ROWS, NUM_ROWS, NUM_PERMUTATIONS, seed=0)

    error = np.abs(mmd_of_members(kernel, members, NUM_ROWS) - gathered(kernel, members)).max()
    times = []
    for _ in range(NUM_REPEATS):
        product = [cpu_seconds(lambda: mmd_of_members(kernel, members, NUM_ROWS)) for _ in range(5)]
        times.append((median(product), cpu_seconds(lambda: gathered(kernel, members))))
    fast, slow = (median(column) for column in zip(*times, strict=True))
    whole = median(
        cpu_seconds(lambda: mmd(reference, window, num_permutations=NUM_PERMUTATIONS, seed=0))
        for _ in range(3)
    )
    print(f"largest difference of MMD^2            {error:9.1e}")
    print(f"one product for all permutations       {1e3 * fast:9.1f} ms")
    print(f"gathering by index                     {1e3 * slow:9.1f} ms")
    print(f"ratio                                  {slow / fast:9.1f}")
    print(f"whole test: kernel, drawing, product   {1e3 * whole:9.1f} ms")


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
