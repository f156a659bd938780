"""Paired comparison of two runs: against plain loops, and against bad input."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from monitoring import paired_bootstrap
from monitoring.comparison import Side, compare_runs
from pipeline.errors import DataError

ROWS = 120


def samples(seed: int, accuracy: float = 0.8, **changed) -> pa.Table:
    draw = np.random.default_rng(seed)
    words = np.array(["one", "two", "three"])
    label = words[np.random.default_rng(99).integers(3, size=ROWS)]
    right = draw.random(ROWS) < accuracy
    inside = {
        "sample_id": list(range(ROWS)),
        "split": ["test"] * ROWS,
        "text": [f"row {row} " + "x" * (row % 40) for row in range(ROWS)],
        "label": label.tolist(),
        "prediction": np.where(right, label, "one").tolist(),
        "correct": right.tolist(),
        "label_log_probability": (-draw.random(ROWS)).tolist(),
        "confidence": draw.uniform(0.3, 1, ROWS).tolist(),
        "energy": draw.integers(0, 6, ROWS).astype(float).tolist(),
    }
    outside = {
        "sample_id": list(range(40)),
        "split": ["ood:far"] * 40,
        "text": [f"far {row}" for row in range(40)],
        "energy": draw.integers(2, 9, 40).astype(float).tolist(),
    }
    inside |= changed
    return pa.concat_tables([pa.table(inside), pa.table(outside)], promote_options="default")


def side(name: str, table: pa.Table) -> Side:
    return Side(name, table, seed=7, num_passes=10, plan_digest="abc")


def column(table: pa.Table, name: str, split: str = "test") -> np.ndarray:
    rows = zip(table["split"].to_pylist(), table[name].to_pylist(), strict=True)
    return np.array([float(value) for of, value in rows if of == split])


def test_every_metric_is_that_of_a_plain_loop():
    a, b = samples(1), samples(2, 0.6)
    found = {one.metric: one for one in compare_runs(side("a", a), side("b", b)).metrics}
    assert found["accuracy"].a == pytest.approx(column(a, "correct").mean())
    assert found["nll"].b == pytest.approx(-column(b, "label_log_probability").mean())
    truth = [0] * ROWS + [1] * 40
    scores = np.concatenate([column(b, "energy"), column(b, "energy", "ood:far")])
    assert found["ood/far/energy"].b == pytest.approx(roc_auc_score(truth, scores))
    confidence, correct = column(a, "confidence"), column(a, "correct")
    bins = np.ceil(confidence * 15).astype(int)
    gaps = [abs((correct - confidence)[bins == b].sum()) for b in set(bins)]
    assert found["ece"].a == pytest.approx(sum(gaps) / ROWS)


def test_an_interval_is_the_one_of_resampling_rows_one_by_one():
    a, b = samples(1), samples(2, 0.6)
    found = compare_runs(side("a", a), side("b", b), num_resamples=400).metric("accuracy")
    difference = column(b, "correct") - column(a, "correct")
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence((0, 0))))
    means = [difference[draw.integers(ROWS, size=ROWS)].mean() for _ in range(400)]
    assert [found.lower, found.upper] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())
    assert found.outcome == "worse"


def test_a_run_is_even_with_itself_everywhere():
    found = compare_runs(side("a", samples(1)), side("b", samples(1)))
    assert {(one.estimate, one.lower, one.upper) for one in (*found.metrics, *found.slices)} == {
        (0.0, 0.0, 0.0)
    }
    assert found.same_masks
    assert found.notes == ()


def test_intervals_of_slices_hold_all_at_once():
    draw = np.random.default_rng(0)
    outside = 0
    for trial in range(200):
        noise = draw.normal(size=(20, 60))
        both = {
            str(place): (
                paired_bootstrap.mean_of("test", np.zeros(60)),
                paired_bootstrap.mean_of("test", row),
            )
            for place, row in enumerate(noise)
        }
        values = paired_bootstrap.resampled(both, {"test": 60}, 200, seed=trial)
        intervals = paired_bootstrap.simultaneous_intervals(values, 0.9).values()
        outside += any(one.lower > 0 or one.upper < 0 for one in intervals)
    assert outside / 200 < 0.18, "one at a time it would be 0.88"


def test_slices_name_lengths_labels_and_predictions():
    names = {
        one.metric for one in compare_runs(side("a", samples(1)), side("b", samples(2))).slices
    }
    assert {"accuracy[label=two]", "accuracy[predicted=one]", "accuracy[length=6-16]"} <= names


def test_a_slice_that_got_worse_is_named():
    label = np.array(samples(1)["label"].to_pylist()[:ROWS])
    worse = samples(1, correct=(column(samples(1), "correct").astype(bool) & (label != "two")))
    found = compare_runs(side("a", samples(1)), side("b", worse)).slices
    assert "accuracy[label=two]" in {one.metric for one in found if one.outcome == "worse"}
    assert "accuracy[label=three]" not in {one.metric for one in found if one.outcome == "worse"}


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_missing_and_non_finite_numbers_are_named(bad):
    numbers = [-0.5] * (ROWS - 2) + [bad] * 2
    broken = side("b", samples(2, label_log_probability=numbers))
    found = compare_runs(side("a", samples(1)), broken)
    assert "nll" not in {one.metric for one in found.metrics}
    assert "in 2 rows of the second run" in found.missing["nll"]


def test_other_masks_are_said():
    other = dataclasses.replace(side("b", samples(2)), seed=8)
    found = compare_runs(side("a", samples(1)), other)
    assert not found.same_masks
    assert "the seed is 7 in the first run and 8 in the second" in found.notes[0]


def test_other_rows_under_the_same_ids_are_refused():
    texts = ["another"] * ROWS
    with pytest.raises(DataError, match="120 of 120 samples have another text"):
        compare_runs(side("a", samples(1)), side("b", samples(2, text=texts)))


def test_rows_of_one_run_only_are_left_out_and_said():
    found = compare_runs(side("a", samples(1).slice(10)), side("b", samples(2)))
    assert found.num_rows == ROWS - 10
    assert found.notes == ("test: 10 rows are in the second run only and are left out",)


def test_runs_with_nothing_in_common_are_refused():
    with pytest.raises(DataError, match="none in common"):
        compare_runs(side("a", samples(1).slice(0, 0)), side("b", samples(2)))


def test_retention_sets_are_judged_apart():
    a, b = samples(1), samples(2, 0.6)
    found = compare_runs(side("a", a), side("b", b), retention={"old": range(100, ROWS)})
    assert found.num_rows == 100
    kept = found.metric("retention/old/accuracy")
    assert kept.b == pytest.approx(column(b, "correct")[100:].mean())
    assert kept.num_rows == 20
    assert found.metric("accuracy").a == pytest.approx(column(a, "correct")[:100].mean())


def test_generated_text_is_judged_by_its_tokens():
    draw = np.random.default_rng(3)
    tokens = draw.integers(5, 50, ROWS)
    table = samples(1).drop_columns(["correct", "label", "prediction", "label_log_probability"])
    inside = table.slice(0, ROWS)
    inside = inside.append_column("num_tokens", pa.array(tokens)).append_column(
        "log_probability", pa.array(-draw.random(ROWS))
    )
    found = compare_runs(side("a", inside), side("b", inside))
    loss = -np.average(inside["log_probability"].to_numpy(), weights=tokens)
    assert found.metric("perplexity").a == pytest.approx(np.exp(loss))
    assert {one.metric.partition("[")[0] for one in found.slices} == {"nll"}
