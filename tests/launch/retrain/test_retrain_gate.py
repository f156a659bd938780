"""The gate: when a challenger takes the champion's place, and every reason against it."""

import dataclasses
import math

import pytest

from launch.retrain.gate import judge
from launch.retrain.policy import GatePolicy
from monitoring.comparison import Comparison, Difference


def difference(metric="accuracy", lower=-0.01, upper=0.02, higher=True, a=0.9) -> Difference:
    middle = (lower + upper) / 2
    return Difference(metric, a, a + middle, middle, lower, upper, 100, higher)


def comparison(*metrics, slices=(), **changed) -> Comparison:
    found = Comparison("a", "b", 100, 0, "f" * 64, True, 0.95, metrics, tuple(slices))
    return dataclasses.replace(found, **changed)


def verdict(found: Comparison, metrics=None, **policy):
    gate = GatePolicy(metrics=metrics or {"accuracy": {"margin": 0.02}}, **policy)
    return judge(found, gate, num_rows=100)


def test_an_interval_within_the_margin_passes():
    found = verdict(comparison(difference(lower=-0.015)))
    assert found.passed
    assert found.checks[1] == "accuracy 0.9000 -> 0.9025 (+0.0025, -0.0150 to +0.0200)"


@pytest.mark.parametrize(("higher", "lower", "upper"), [(True, -0.03, 0.05), (False, -0.05, 0.03)])
def test_an_interval_that_reaches_beyond_the_margin_rejects(higher, lower, upper):
    found = verdict(comparison(difference(lower=lower, upper=upper, higher=higher)))
    assert "it may be worse by more than 0.02" in found.against[0]


@pytest.mark.parametrize(("lower", "passes"), [(0.001, True), (0.0, False), (-0.001, False)])
def test_be_better_asks_for_the_whole_interval(lower, passes):
    metrics = {"accuracy": {"must": "be_better"}}
    assert verdict(comparison(difference(lower=lower)), metrics).passed is passes


def test_a_missing_metric_rejects_with_its_reason():
    found = verdict(comparison(missing={"accuracy": "correct is NaN in 3 rows"}))
    assert found.against == ("accuracy is missing: correct is NaN in 3 rows",)


@pytest.mark.parametrize("place", ["a", "b", "lower", "upper"])
def test_a_number_that_is_none_rejects(place):
    broken = dataclasses.replace(difference(), **{place: math.nan})
    assert verdict(comparison(broken)).against == ("accuracy is not a finite number",)


def test_a_slice_that_is_worse_for_certain_rejects():
    worse = difference("accuracy[label=one]", -0.3, -0.05)
    assert (
        "this slice is worse for certain"
        in verdict(comparison(difference(), slices=[worse])).against[0]
    )
    assert verdict(comparison(difference(), slices=[worse]), slices={"margin": 0.1}).passed
    assert verdict(comparison(difference(), slices=[worse]), slices=None).passed


def test_slices_that_only_may_be_worse_pass():
    unsure = difference("accuracy[label=one]", -0.3, 0.001)
    assert verdict(comparison(difference(), slices=[unsure])).passed


def test_a_lost_skill_rejects_and_so_does_one_that_was_not_measured():
    kept = {"retention": {"old": {"files": ["old.jsonl"], "margin": 0.0}}}
    lost = difference("retention/old/accuracy", -0.2, -0.1)
    assert "retention/old/accuracy" in verdict(comparison(difference(), lost), **kept).against[0]
    found = verdict(comparison(difference()), **kept)
    assert found.against == ("retention/old/accuracy is missing: neither run was measured by it",)


def test_other_rows_or_other_masks_reject_whatever_the_numbers_say():
    better = difference(lower=0.1, upper=0.2)
    assert not verdict(comparison(better, num_rows=99)).passed
    assert not verdict(comparison(better, num_unpaired=1, notes=("one row",))).passed
    assert not verdict(comparison(better, same_masks=False, notes=("other masks",))).passed
