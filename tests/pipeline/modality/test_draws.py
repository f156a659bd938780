"""Numbers of augmentations: functions of their coordinates, evenly spread, independent."""

import numpy as np
from scipy import stats

from pipeline.dropout.key import derive_key
from pipeline.dropout.philox import philox4x32_10
from pipeline.modality.draws import normal, uniform


def test_numbers_are_those_of_the_generator_at_their_coordinates():
    found = uniform(7, 3, "crop", [5, 900], 6)
    key = derive_key(7, "augment", 3, "uniform", "crop", 0)
    for row, sample in zip(found, (5, 900), strict=True):
        words = philox4x32_10(key, [[0, 0, sample, 0], [1, 0, sample, 0]]).ravel()[:6]
        assert np.array_equal(row, (words.astype(np.float64) + 0.5) / 2**32)


def test_a_sample_draws_the_same_in_any_batch():
    whole = uniform(0, 1, "flip", [3, 1, 2], 5)
    assert np.array_equal(uniform(0, 1, "flip", [2, 3], 5), whole[[2, 0]])


def test_names_steps_and_seeds_draw_apart():
    others = [(1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    first = uniform(0, 0, "a", [1], 8)
    assert all(not np.isin(uniform(*where, [1], 8), first).any() for where in others)


def test_numbers_are_evenly_spread():
    numbers = uniform(1, 0, "spread", list(range(20_000)), 5)
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    correlations = np.corrcoef(numbers.T)[np.triu_indices(5, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(20_000)


def test_noise_is_normal_and_white():
    noise = normal(1, 0, "noise", 17, 100_001)
    assert len(noise) == 100_001
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / np.sqrt(100_000)
