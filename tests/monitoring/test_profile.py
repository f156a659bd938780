"""The reference profile: parts merge into the whole, and the files hold what was written."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monitoring.exact_sums import ExactSum, products
from monitoring.profile import MAX_SAMPLE_ROWS, merge, profile_of, read_profile, write_profile
from monitoring.summaries import (
    OTHER,
    SIGNED_LOG,
    UNIT,
    NumericSummary,
    category_counts,
    histogram,
)
from pipeline.errors import DataError, RunFolderError
from pipeline.records import RunFolder

NAMES = ("asyncio", "email", "json")
ABOUT = {"task": "text-classification", "label_names": list(NAMES), "carried": ["price", "shop"]}


def scored(num_rows, seed=0, num_dimensions=5, first_id=0):
    """Scored rows of a classifier, some of them without a label."""
    random = np.random.default_rng(seed)
    label = [None if random.random() < 0.1 else str(random.choice(NAMES)) for _ in range(num_rows)]
    prediction = [str(random.choice(NAMES)) for _ in range(num_rows)]
    right = [None if a is None else a == b for a, b in zip(label, prediction, strict=True)]
    embedding = random.normal(0, 3, (num_rows, num_dimensions)).astype(np.float32)
    columns = {
        "sample_id": pa.array(range(first_id, first_id + num_rows), pa.int64()),
        "text": ["some text"] * num_rows,
        "num_tokens": random.integers(3, 64, num_rows),
        "label": pa.array(label, pa.string()),
        "prediction": prediction,
        "correct": pa.array(right, pa.bool_()),
        "confidence": random.beta(5, 1, num_rows),
        "energy": random.normal(-8, 2, num_rows),
        "embedding": pa.array(list(embedding), pa.list_(pa.float32())),
        "price": pa.array([None if n % 7 == 0 else n * 1e-3 for n in range(num_rows)]),
        "shop": [f"shop {n % 900}" for n in range(num_rows)],
    }
    return pa.table(columns).replace_schema_metadata({"masklock": json.dumps(ABOUT)})


def profile(table):
    return profile_of(table, model_version="v1")


def parts_of(table, seed, num_parts):
    """The rows in another order, dealt to parts of uneven size, empty ones among them."""
    random = np.random.default_rng(seed)
    part = random.choice(num_parts, len(table), p=random.dirichlet(np.ones(num_parts)))
    order = random.permutation(len(table))
    return [table.take(order[part[order] == number]) for number in range(num_parts)]


def assert_same(found, expected):
    """Integers exactly, float64 to 1e-12."""
    if isinstance(expected, ExactSum):
        assert_same(found.high, expected.high)
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, np.ndarray | float):
        is_sum = np.asarray(expected).dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-12 * is_sum)
    else:
        assert found == expected


# -- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "num_parts"), [(0, 2), (1, 3), (2, 17), (3, 60)])
def test_parts_in_any_order_merge_into_the_profile_of_the_whole(seed, num_parts):
    table = scored(2500, seed)
    merged, *others = (profile(part) for part in parts_of(table, seed, num_parts))
    for other in others:
        merged = merge(merged, other)
    assert_same(merged, profile(table))


def test_merging_in_a_tree_gives_the_bits_of_merging_in_a_row():
    one, two, three, four = (profile(part) for part in parts_of(scored(900), 5, 4))
    row, tree = (
        merge(merge(merge(one, two), three), four),
        merge(merge(four, two), merge(three, one)),
    )
    assert np.array_equal(row.second_moment, tree.second_moment)
    assert {n: s.sum for n, s in row.numbers.items()} == {n: s.sum for n, s in tree.numbers.items()}


def test_rows_merge_with_rows_from_a_file(tmp_path):
    first, second = scored(30), scored(30, first_id=30)
    pq.write_table(second, tmp_path / "scored.parquet")
    merged = merge(profile(first), profile(pq.read_table(tmp_path / "scored.parquet")))
    assert_same(merged, merge(profile(first), profile(second)))


def test_profiles_of_different_things_do_not_merge():
    one, other = profile(scored(9)), profile_of(scored(9, first_id=9), model_version="v2")
    with pytest.raises(DataError, match="model_version: v1 and v2"):
        merge(one, other)
    finer = profile_of(scored(9, first_id=9), model_version="v1", num_bins=20)
    with pytest.raises(DataError, match="calibration bins: 15 and 20"):
        merge(one, finer)
    with pytest.raises(DataError, match="share a sample_id"):
        merge(one, one)


# -- what is in it -------------------------------------------------------------------------------


def test_sums_are_those_of_exact_fractions():
    values = [1e16, 1.0, -1e16, 1e-9] * 50
    found = ExactSum.of(values[:77]) + ExactSum.of(values[77:])
    expected = sum(Fraction(value) for value in values)
    assert Fraction(float(found.high)) + Fraction(float(found.low)) == pytest.approx(expected)
    assert float(found.high) == float(expected)


def test_products_are_those_of_exact_fractions():
    random = np.random.default_rng(0)
    x = (random.normal(size=(5000, 3)) * [1e-3, 1.0, 1e5]).astype(np.float32).astype(np.float64)
    found = products(x, x)
    for i, j in ((0, 0), (0, 1), (1, 2), (2, 2)):
        expected = sum(Fraction(a) * Fraction(b) for a, b in zip(x[:, i], x[:, j], strict=True))
        assert float(found.high[i, j]) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ValueError, match="finite"):
        products(x, x * np.nan)


def test_moments_and_class_sums_are_those_of_numpy():
    table = scored(400)
    x = np.array(table["embedding"].to_pylist())
    found = profile(table)
    np.testing.assert_allclose(found.second_moment, x.T @ x, rtol=1e-9)
    pairs = zip(table["label"].to_pylist(), table["prediction"].to_pylist(), strict=True)
    named = np.array([label or prediction for label, prediction in pairs])
    for place, name in enumerate(found.classes.names):
        assert found.classes.counts[place] == (named == name).sum()
        np.testing.assert_allclose(found.classes.sums.high[place], x[named == name].sum(axis=0))


def test_calibration_is_that_of_the_evaluation():
    from pipeline.evaluation.calibration import expected_calibration_error

    table = scored(600)
    known = table.filter(table["correct"].is_valid())
    bins, correct = profile(table).calibration, known["correct"].to_numpy()
    assert bins.error == pytest.approx(expected_calibration_error(known["confidence"], correct))
    assert bins.correct.sum() / bins.count.sum() == correct.mean()


@pytest.mark.parametrize("grid", [UNIT, SIGNED_LOG])
def test_histograms_count_every_value_once_on_a_grid_that_nothing_moves(grid):
    values = np.array([-1e30, -3.0, -1e-9, 0.0, 0.25, 0.5, 0.999, 1.0, 7.0, 1e30])
    summary = NumericSummary.of(np.append(values, [np.nan, np.inf]), grid)
    edges, places = summary.edges, np.flatnonzero(summary.counts)
    assert (summary.count, summary.missing, summary.counts.sum()) == (10, 2, 10)
    for value in values:
        assert any(edges[place] < value <= edges[place + 1] for place in places)
    assert summary.maximum == values.max()
    assert summary.mean == math.fsum(values) / 10


def test_magnitudes_are_told_apart_to_five_percent():
    values = np.geomspace(1e-6, 1e9, 1000)
    edges = NumericSummary.of(values, SIGNED_LOG).edges
    place = np.searchsorted(edges, values) - 1
    assert (edges[place + 1] / edges[place] < 1.05).all()
    assert histogram(values, SIGNED_LOG).sum() == 1000


def test_many_categories_are_kept_by_key_and_the_rest_is_counted():
    counts = category_counts([f"shop {n % 900}" for n in range(1800)] + ["x" * 200])
    assert len(counts) == 501
    assert sum(counts.values()) == 1801
    assert counts[OTHER] == 801


def test_the_sample_holds_rows_as_they_were():
    table = scored(3000)
    sample = profile(table).sample
    assert len(sample) == MAX_SAMPLE_ROWS
    assert sample.column_names == [
        "sample_id", "num_tokens", "correct", "confidence", "energy", "price", "embedding",
    ]  # fmt: skip
    rows = table.take(sample["sample_id"])
    assert sample["confidence"].to_pylist() == rows["confidence"].to_pylist()
    found = profile(table).sample_embeddings()
    np.testing.assert_allclose(found, np.array(rows["embedding"].to_pylist()), rtol=1e-3, atol=1e-6)


def test_wide_embeddings_leave_room_for_fewer_rows_and_for_no_moment():
    found = profile(scored(2000, num_dimensions=2048))
    assert found.moment is None
    assert len(found.sample) == 1024


def test_a_language_model_has_a_profile_without_classes():
    rows = {"sample_id": range(40), "perplexity": np.arange(40.0), "embedding": [[1.0, 2.0]] * 40}
    about = {"masklock": json.dumps({"task": "text-generation"})}
    found = profile(pa.table(rows).replace_schema_metadata(about))
    assert found.label_names is found.calibration is None
    assert found.classes.names == ("",)
    assert found.classes.sums.high.tolist() == [[40.0, 80.0]]


# -- files ---------------------------------------------------------------------------------------


def test_a_profile_is_read_as_it_was_written_and_is_small(tmp_path):
    written, folder = profile(scored(2500, num_dimensions=384)), RunFolder(tmp_path)
    write_profile(folder, written)
    found = read_profile(folder, "v1")
    assert_same(found, written)
    assert np.array_equal(found.second_moment, written.second_moment)
    assert sum(path.stat().st_size for path in folder.profile.iterdir()) < 4e6


def test_the_same_rows_give_the_same_files(tmp_path):
    first, second = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    write_profile(first, profile(scored(300)))
    write_profile(second, profile(scored(300)))
    for path in first.profile.iterdir():
        assert path.read_bytes() == (second.profile / path.name).read_bytes()


@pytest.mark.parametrize("name", ["profile.json", "arrays.npz", "sample.parquet"])
def test_a_damaged_or_missing_file_is_named(tmp_path, name):
    folder = RunFolder(tmp_path)
    write_profile(folder, profile(scored(20)))
    path = folder.profile / name
    path.write_bytes(path.read_bytes()[:-40] + b" " * 39 + b"}")
    with pytest.raises(RunFolderError, match=f"{name} .*Evaluate the run again"):
        read_profile(folder)
    path.unlink()
    with pytest.raises(RunFolderError, match="no reference profile" if name[0] == "p" else name):
        read_profile(folder)


def test_text_that_is_no_json_and_other_schemas_are_refused(tmp_path):
    folder = RunFolder(tmp_path)
    write_profile(folder, profile(scored(20)))
    path = folder.profile / "profile.json"
    path.write_text(path.read_text().replace("masklock-profile-v1", "masklock-profile-v9"))
    with pytest.raises(RunFolderError, match="schema 'masklock-profile-v9'.*reads 'masklock-prof"):
        read_profile(folder)
    path.write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        read_profile(folder)


def test_the_profile_of_an_older_model_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    write_profile(folder, profile(scored(20)))
    with pytest.raises(RunFolderError, match="of model v1, but the run's model is now v2"):
        read_profile(folder, "v2")
