"""Records that differ in one thing: what is said names it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.verify.compare import Outcome, Record, compare, gradient_difference
from pipeline.verify.reference import trained_weights

MASKS = {
    "0": {"a#0": {"5": "x", "9": "y"}, "b#0": {"5": "z", "9": "w"}},
    "1": {"a#0": {"2": "u"}, "b#0": {"2": "v"}},
}
WEIGHTS = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])}
SAME = Record(MASKS, [], {"0": 2.0}, WEIGHTS, {"0": WEIGHTS, "1": WEIGHTS})


def said_of(**changes):
    outcome = compare("ddp:2", replace(SAME, **changes), SAME, 1.0)
    assert not outcome.equal
    assert f"ddp:2          DIFFERS  {outcome.masks:>7}" in str(outcome)
    return "\n".join(outcome.differences)


def test_equal_records_are_equal():
    outcome = compare("ddp:2", SAME, SAME, 1.0)
    assert outcome.equal
    assert (outcome.masks, outcome.gradient_difference, outcome.weight_difference) == (6, 0, 0)
    assert outcome.differences == ()


def test_a_bias_of_nothing_but_rounding_is_judged_by_the_step_that_moved_it():
    expected = replace(SAME, weights=WEIGHTS | {"key.bias": torch.tensor([1e-9])})
    found = replace(SAME, weights=WEIGHTS | {"key.bias": torch.tensor([3e-9])})
    assert not compare("ddp:2", found, expected, 1.0).equal
    assert compare("ddp:2", found, expected, 1.0, step_size=1e-3).equal
    moved = replace(SAME, weights=WEIGHTS | {"key.bias": torch.tensor([1e-3])})
    assert not compare("ddp:2", moved, expected, 1.0, step_size=1e-3).equal


def test_another_mask_is_named_by_step_site_and_sample():
    masks = MASKS | {"0": MASKS["0"] | {"b#0": {"5": "z", "9": "OTHER"}}, "1": {"a#0": {"2": "?"}}}
    said = said_of(masks=masks)
    assert said == "3 masks differ; step 0, site b#0, sample 9: it is another one"


def test_a_mask_that_was_not_drawn_or_should_not_have_been_is_named():
    missing = MASKS | {"1": {"a#0": {"2": "u"}}}
    assert "step 1, site b#0, sample 2: it was not drawn" in said_of(masks=missing)
    more = MASKS | {"1": MASKS["1"] | {"c#0": {"2": "v"}}}
    assert "step 1, site c#0, sample 2: it should not have been drawn" in said_of(masks=more)


def test_other_samples_are_said_to_be_another_order():
    masks = MASKS | {"1": {"a#0": {"7": "u"}, "b#0": {"7": "v"}}}
    assert "step 1 visits other samples: [7] in place of [2]" in said_of(masks=masks)


def test_another_loss_is_named_by_step():
    assert said_of(losses={"0": 8.0}) == "the loss of step 0 is 8.0, not 2.0"


@pytest.mark.parametrize("value", [1.001, float("nan"), float("inf")])
def test_other_gradients_are_named_by_the_first_step_and_parameter(value):
    other = {"w": torch.tensor([value, -2.0]), "b": WEIGHTS["b"]}
    assert "first in step 1, most in w" in said_of(gradients={"0": WEIGHTS, "1": other})


def test_a_parameter_without_gradient_has_a_zero_one():
    without = {"0": {"w": WEIGHTS["w"]}}
    zero = {"0": {"w": WEIGHTS["w"], "b": torch.zeros(1)}}
    assert gradient_difference(without, zero)[0] == 0
    assert gradient_difference({}, zero) == (None, "")


@pytest.mark.parametrize("value", [1.0001, float("nan")])
def test_other_weights_are_named_by_the_tensor(value):
    weights = WEIGHTS | {"w": torch.tensor([value, -2.0])}
    assert said_of(weights=weights).endswith("most in w")
    assert "b is not in both" in said_of(weights={"w": WEIGHTS["w"]})


def test_tied_weights_may_be_stored_once_but_not_left_out():
    expected = replace(SAME, weights=WEIGHTS | {"head": WEIGHTS["w"]})
    assert compare("ddp:2", SAME, expected, 1.0).equal
    assert compare("ddp:2", expected, expected, 1.0).equal
    untied = replace(SAME, weights=WEIGHTS | {"head": WEIGHTS["w"].clone()})
    assert "head is not in both" in "".join(compare("ddp:2", SAME, untied, 1.0).differences)


def test_the_plain_loop_keeps_tied_weights_one_tensor():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    found = trained_weights(model)
    assert found["a.weight"] is found["b.weight"]
    assert found["a.weight"].equal(model["a"].weight)
    assert found["c.weight"].equal(model["c"].weight)
    assert found["c.weight"].data_ptr() != model["c"].weight.data_ptr()


def test_a_failed_layout_keeps_its_last_lines():
    outcome = Outcome.failed("zero3:2", "exit code 1; its last lines:\n      boom", 2.0)
    assert "zero3:2        FAILED" in str(outcome)
    assert str(outcome).endswith("boom")
    assert outcome.to_json()["equal"] is False
    assert outcome.to_json()["weight_difference"] is None
