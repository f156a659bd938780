"""MMD against sums over all pairs, scikit-learn's kernel and gathering by index."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel

from monitoring.drift.embeddings import (
    gaussian_kernel,
    median_distance,
    mmd,
    mmd_of_members,
)
from monitoring.drift.permutations import permuted_members

RANDOM = np.random.default_rng(5)
REFERENCE = RANDOM.normal(size=(40, 6)).astype(np.float32)
WINDOW = RANDOM.normal(0.2, size=(30, 6)).astype(np.float32)
POOLED = np.concatenate([REFERENCE, WINDOW])


def plain_mmd(kernel, first, second):
    """MMD^2 by gathering the rows of either side."""
    inside = [kernel[np.ix_(side, side)] for side in (first, second)]
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in inside]
    return sum(means) - 2 * kernel[np.ix_(first, second)].mean()


def test_the_kernel_is_that_of_scikit_learn_with_the_median_distance():
    distances = euclidean_distances(REFERENCE.astype(np.float64))
    bandwidth = np.median(distances[np.triu_indices(40, 1)])
    assert median_distance(REFERENCE) == pytest.approx(bandwidth, rel=1e-6)
    expected = rbf_kernel(POOLED, gamma=1 / (2 * bandwidth**2))
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(gaussian_kernel(POOLED, bandwidth), expected, atol=1e-5)


def test_one_product_gives_what_gathering_by_index_gives():
    kernel, members = gaussian_kernel(POOLED, 3.0), permuted_members(40, 30, 25, seed=1)
    expected = [
        plain_mmd(kernel.astype(np.float64), np.flatnonzero(column), np.flatnonzero(column == 0))
        for column in members.T
    ]
    np.testing.assert_allclose(mmd_of_members(kernel, members, 40), expected, atol=1e-6)


def test_the_first_column_is_the_division_observed_and_the_others_keep_the_sizes():
    members = permuted_members(40, 30, 25, seed=1)
    assert members[:, 0].tolist() == [1] * 40 + [0] * 30
    assert (members.sum(axis=0) == 40).all()
    assert len({tuple(column) for column in members.T}) == 26


def test_rows_of_one_distribution_give_uniform_p_values():
    pairs = RANDOM.normal(size=(150, 60, 4))
    p_values = np.array(
        [mmd(p[:30], p[30:], num_permutations=99, seed=i).p_value for i, p in enumerate(pairs)]
    )
    assert np.mean(p_values <= 0.1) <= 0.18  # 150 draws: 998 of 1,000 cases
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.08)


def test_a_shift_is_found():
    found = mmd(REFERENCE, WINDOW + 1, num_permutations=199, seed=0)
    assert found.p_value == pytest.approx(1 / 200)
    assert found.effect == pytest.approx(np.sqrt(found.statistic))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_equal_rows_and_far_origins_do_no_harm(offset):
    rows = np.full((20, 3), offset, dtype=np.float32)
    found = mmd(rows, rows, num_permutations=9, seed=0)
    assert (found.p_value, found.effect) == (1.0, 0.0)


def test_a_clear_difference_is_known_more_finely_than_a_thousand_permutations_can():
    found = mmd(REFERENCE, WINDOW + 2, num_permutations=5000, seed=0)
    assert found.p_value == 1 / 5001


def test_no_difference_is_told_by_the_first_thousand():
    rows = np.random.default_rng(3).normal(size=(90, 3))
    found = mmd(rows[:50], rows[50:], num_permutations=5000, seed=0)
    first = mmd(rows[:50], rows[50:], num_permutations=1000, seed=0)
    assert found == first
    assert found.p_value > 10 / 1001
