"""Tests of one column against plain references, scipy and river; all of them keep their level."""

import numpy as np
import pytest
from river.stats import KolmogorovSmirnov
from scipy import stats

from monitoring.drift.binning import binned, category_counts
from monitoring.drift.statistics import TESTS, chi2
from monitoring.summaries import OTHER

RANDOM = np.random.default_rng(3)
NORMAL = (RANDOM.normal(size=300), RANDOM.normal(0.3, 1.2, size=200))
TIED = (RANDOM.integers(0, 4, 300) / 4, RANDOM.integers(0, 5, 200) / 4)
COUNTS = (np.array([40, 30, 20, 10]), np.array([10, 10, 5, 25]))


def both_functions(reference, window):
    """The two distribution functions at every pooled row."""
    pooled = np.concatenate([reference, window])
    return [np.array([(side <= value).mean() for value in pooled]) for side in (reference, window)]


@pytest.mark.parametrize(("reference", "window"), [NORMAL, TIED], ids=["continuous", "tied"])
def test_ks_is_the_largest_distance_of_the_distribution_functions(reference, window):
    first, second = both_functions(reference, window)
    found = TESTS["ks"].run(reference, window)
    assert found.effect == found.statistic == pytest.approx(np.abs(first - second).max())


def test_ks_agrees_with_river():
    incremental = KolmogorovSmirnov()
    for pair in zip(NORMAL[0][:200].tolist(), NORMAL[1].tolist(), strict=True):
        incremental.update(*pair)
    found = TESTS["ks"].run(NORMAL[0][:200], NORMAL[1])
    assert found.statistic == pytest.approx(incremental.get())


def test_cramer_von_mises_is_the_mean_squared_distance_times_its_factor():
    n, m = map(len, NORMAL)
    first, second = both_functions(*NORMAL)
    squared = ((first - second) ** 2).mean()
    found = TESTS["cramer_von_mises"].run(*NORMAL)
    assert found.statistic == pytest.approx(n * m / (n + m) * squared)
    assert found.effect == pytest.approx(np.sqrt(squared))
    assert found.p_value == pytest.approx(stats.cramervonmises_2samp(*NORMAL).pvalue)


def test_cramer_von_mises_of_tied_rows_has_the_p_value_of_permutations():
    pair = TIED[0][:40], TIED[1][:30]
    pooled, random = np.concatenate(pair), np.random.default_rng(0)

    def mean_square(values):
        first, second = both_functions(values[:40], values[40:])
        return ((first - second) ** 2).mean()

    drawn = [mean_square(random.permutation(pooled)) >= mean_square(pooled) for _ in range(500)]
    found = TESTS["cramer_von_mises"].run(*pair)
    assert found.effect == pytest.approx(np.sqrt(mean_square(pooled)))
    assert found.p_value == pytest.approx(np.mean(drawn), abs=0.08)


def test_wasserstein_is_the_mean_distance_of_sorted_rows():
    reference, window = NORMAL[0][:200], NORMAL[1]
    found = TESTS["wasserstein"].run(reference, window)
    distance = np.abs(np.sort(reference) - np.sort(window)).mean()
    assert found.statistic == pytest.approx(distance)
    assert found.effect == pytest.approx(distance / np.concatenate([reference, window]).std())


def test_tails_count_the_rows_outside_the_middle_of_the_reference():
    reference = np.arange(1, 101).astype(float)
    window = np.concatenate([np.full(80, 50.0), np.full(20, 200.0)])
    found = TESTS["tails"].run(reference, window)
    expected = chi2(np.array([4, 91, 5]), np.array([0, 80, 20]))
    assert (found.statistic, found.p_value) == (expected.statistic, expected.p_value)
    assert found.effect == pytest.approx(0.15)


def test_chi2_is_that_of_scipy_and_its_effect_does_not_grow_with_the_rows():
    found = TESTS["chi2"].run(*COUNTS)
    expected = stats.chi2_contingency(np.stack(COUNTS), correction=False)
    assert found.p_value == pytest.approx(expected.pvalue)
    more = TESTS["chi2"].run(100 * COUNTS[0], 100 * COUNTS[1])
    assert more.effect == pytest.approx(found.effect)


def test_chi2_of_sparse_counts_has_the_p_value_of_permutations():
    reference, window = np.array([9, 3, 3, 2, 1, 2]), np.array([2, 3, 4, 0, 3, 0])
    pooled = np.repeat(np.arange(6), reference + window)
    random = np.random.default_rng(0)
    observed = stats.chi2_contingency(np.stack([reference, window])).statistic
    drawn = []
    for _ in range(2000):
        random.shuffle(pooled)
        table = [np.bincount(part, minlength=6) for part in np.split(pooled, [20])]
        drawn.append(stats.chi2_contingency(np.stack(table)).statistic >= observed - 1e-9)
    assert TESTS["chi2"].run(reference, window).p_value == pytest.approx(np.mean(drawn), abs=0.04)


def test_psi_and_jensen_shannon_follow_their_formulas():
    r, w = ((counts + 0.5) / (counts + 0.5).sum() for counts in COUNTS)
    assert TESTS["psi"].run(*COUNTS).effect == pytest.approx(((w - r) * np.log(w / r)).sum())
    r, w = (counts / counts.sum() for counts in COUNTS)
    halves = [stats.entropy(side, (r + w) / 2, base=2) for side in (r, w)]
    assert TESTS["jensen_shannon"].run(*COUNTS).effect == pytest.approx(np.sqrt(np.mean(halves)))


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize(
    "values",
    [np.full(60, 7.0), np.repeat([0.0, 1.0], 30), NORMAL[0][:60], np.array([1e300, -1e300, 0.0])],
    ids=["constant", "two values", "continuous", "huge"],
)
def test_a_column_equal_to_the_reference_shows_no_change(name, values):
    test = TESTS[name]
    found = test.run(*(binned(values, values) if test.on_counts else (values, values)))
    assert found.effect == pytest.approx(0, abs=1e-6)
    assert found.p_value is None if not test.decides else found.p_value > 0.9


@pytest.mark.parametrize("name", TESTS)
def test_what_is_registered_leaves_its_input_alone_and_repeats_itself(name):
    pair = COUNTS if TESTS[name].on_counts else TIED
    before = [side.copy() for side in pair]
    assert TESTS[name].run(*pair) == TESTS[name].run(*pair)
    assert all((side == copy).all() for side, copy in zip(pair, before, strict=True))


@pytest.mark.parametrize("name", [name for name, test in TESTS.items() if test.decides])
@pytest.mark.parametrize("draw", ["normal", "tied", "sparse"])
def test_every_deciding_test_keeps_its_level(name, draw):
    test, random = TESTS[name], np.random.default_rng(11)
    sample = {
        "normal": lambda size: random.normal(size=size),
        "tied": lambda size: random.binomial(10, 0.05, size) / 10,
        "sparse": lambda size: random.zipf(2.5, size).astype(float),
    }[draw]
    p_values = []
    for _ in range(120):
        pair = sample(200), sample(60)
        p_values.append(test.run(*(binned(*pair) if test.on_counts else pair)).p_value)
    # 120 draws of a share of 0.1 stay below 0.18 in 997 of 1,000 cases
    assert np.mean(np.array(p_values) <= 0.1) <= 0.18


def test_a_continuous_column_is_cut_at_the_deciles_of_the_reference():
    reference = np.arange(1.0, 101.0)
    counts, window = binned(reference, np.array([0.0, 10.0, 10.5, 95.0, 1000.0]))
    assert counts.tolist() == [10] * 10
    assert window.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]


def test_few_values_have_bins_of_their_own_and_so_do_the_gaps_between_them():
    reference = np.array([0.0, 0.0, 1.0])
    counts, window = binned(reference, np.array([-1.0, 0.0, 0.5, 1.0, 2.0]))
    assert counts.tolist() == [0, 2, 0, 1, 0]
    assert window.tolist() == [1, 1, 1, 1, 1]


def test_names_of_either_side_are_counted():
    counts, window = category_counts({"a": 3, "b": 1}, ["b", "c", "b"])
    assert (counts.tolist(), window.tolist()) == ([3, 1, 0], [0, 2, 1])
    counts, window = category_counts({"a": 3, OTHER: 1}, ["b", "c", "a"])
    assert (counts.tolist(), window.tolist()) == ([1, 3], [2, 1])


def test_equal_shares_of_more_rows_are_at_no_distance():
    counts = np.random.default_rng(8).integers(1, 50, size=(100, 7))
    distances = [TESTS["jensen_shannon"].run(one, 3 * one).effect for one in counts]
    assert distances == pytest.approx([0.0] * 100, abs=1e-7)
