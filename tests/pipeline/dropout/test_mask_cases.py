"""Mask cases as JSON, by both kernels: the published masks, every variant, one clear error."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.dropout.cases import fill_cases
from pipeline.dropout.kernels import cpu
from pipeline.dropout.variants import VARIANTS, Variant, register
from pipeline.errors import InputError

VECTORS = json.loads(Path(__file__).with_name("mask_vectors.json").read_text())
RESULTS = {"keep", "kept", "first_lanes", "threshold", "scale"}


@pytest.fixture(params=["active", "numpy"])
def kernel(request):
    if request.param == "active" and os.environ.get("MASKLOCK_KERNEL") != "numpy":
        assert cpu.library() or shutil.which("g++") is None, "the compiled kernel was not built"
    return request.param


def questions():
    """The published cases without their answers."""
    return {
        name: [{k: v for k, v in case.items() if k not in RESULTS} for case in VECTORS[name]]
        for name in ("rows", "attention")
    }


def row_case(variant, **changes):
    case = {
        "arguments": [1, "train", 2, variant, "a.b", 0],
        "ids": [2**64 - 1, 7],
        "positions": [[0, 1, 5], [2, 1, 0]],
        "features": 20,
        "p": 0.5,
    }
    return case | changes


def bits(case):
    rows = [[list(bytes.fromhex(row)) for row in sample] for sample in case["keep"]]
    packed = np.array(rows, dtype=np.uint8)
    return np.unpackbits(packed, axis=-1, bitorder="little")[..., : case["features"]]


@pytest.mark.parametrize("name", ["rows", "attention"])
def test_masks_are_the_published_ones(kernel, name):
    filled = fill_cases(questions(), kernel)[name]
    for case, published in zip(filled, VECTORS[name], strict=True):
        assert case["keep"] == published["keep"]


def test_the_question_comes_back_with_the_answer_and_is_not_changed(kernel):
    asked = questions() | {"spec": "masklock-v1"}
    before = copy.deepcopy(asked)
    filled = fill_cases(asked, kernel)
    assert asked == before
    assert filled["spec"] == "masklock-v1"
    for case, full in zip(asked["rows"], filled["rows"], strict=True):
        assert full == case | {"keep": full["keep"]}


def test_one_kind_of_case_is_enough(kernel):
    assert list(fill_cases({"attention": questions()["attention"]}, kernel)) == ["attention"]


def test_token_cases_keep_whole_positions(kernel):
    keep = bits(fill_cases({"rows": [row_case("token")]}, kernel)["rows"][0])
    assert (keep == keep[:, :, :1]).all()
    assert 0 < keep.mean() < 1


def test_block_cases_keep_whole_blocks(kernel):
    keep = bits(fill_cases({"rows": [row_case("block", block_size=4)]}, kernel)["rows"][0])
    assert (keep.reshape(2, 3, 5, 4) == keep[:, :, ::4, None]).all()
    assert 0 < keep.mean() < 1


def test_channel_cases_keep_the_same_features_at_all_positions(kernel):
    keep = bits(fill_cases({"rows": [row_case("channel")]}, kernel)["rows"][0])
    assert (keep == keep[:, :1]).all()
    assert 0 < keep.mean() < 1


def test_ids_may_differ_by_token(kernel):
    case = row_case("element", ids=[[3, 9, 3]], positions=[[0, 0, 0]])
    first, other, same = bits(fill_cases({"rows": [case]}, kernel)["rows"][0])[0]
    assert (first == same).all()
    assert (first != other).any()


@pytest.mark.parametrize(("p", "kept"), [(0, 1.0), (1, 0.0)])
def test_rates_of_0_and_1_are_whole_numbers_in_json(kernel, p, kept):
    assert bits(fill_cases({"rows": [row_case("element", p=p)]}, kernel)["rows"][0]).mean() == kept


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("p", 1.5),
        ("p", "0.1"),
        ("p", float("nan")),
        ("ids", [1]),
        ("ids", [2**64, 0]),
        ("ids", [[1, 2], [3, 4]]),
        ("ids", "x"),
        ("positions", [[0, 1], [0]]),
        ("positions", [[2**32], [0]]),
        ("features", 0),
        ("features", True),
        ("arguments", [1, "train", 2, "element", "a.b"]),
        ("arguments", [-1, "train", 2, "element", "a.b", 0]),
        ("arguments", [1, "train", 2, "elemental", "a.b", 0]),
        ("arguments", [1, "train", 2, "attention", "a.b", 0]),
        ("arguments", [1, "train", 2, "path", "a.b", 0]),
        ("block_size", 0),
    ],
)
def test_a_bad_field_is_named_with_its_case(field, value):
    cases = [row_case("element"), row_case("element", **{field: value})]
    if (field, value) == ("ids", [1]):  # then positions are too many for the ids
        field = "positions"
    with pytest.raises(InputError, match=rf"^rows\[1\]\.{field}"):
        fill_cases({"rows": cases})


@pytest.mark.parametrize("field", ["arguments", "ids", "positions", "features", "p"])
def test_a_missing_field_is_named_with_its_case(field):
    case = row_case("element")
    del case[field]
    with pytest.raises(InputError, match=rf"^rows\[0\]\.{field}: Field required"):
        fill_cases({"rows": [case]})


def test_a_block_case_without_its_size_is_refused():
    with pytest.raises(InputError, match=r"rows\[0\]\.block_size"):
        fill_cases({"rows": [row_case("block")]})


@pytest.mark.parametrize(
    ("field", "value"),
    [("heads", 4097), ("key_positions", [[2**23]]), ("query_positions", [[0], [1]])],
)
def test_attention_beyond_its_limits_is_refused_by_name(field, value):
    cases = questions()["attention"][1:]
    cases[0][field] = value
    with pytest.raises(InputError, match=rf"^attention\[0\]\.{field}"):
        fill_cases({"attention": cases})


@pytest.mark.parametrize("document", [[], {}, "x", {"rows": 3}, {"rows": [3]}, {"attention": {}}])
def test_a_document_of_another_form_is_refused(document):
    with pytest.raises(InputError, match="must be a"):
        fill_cases(document)


def test_a_variant_has_one_name():
    with pytest.raises(ValueError, match="exists already"):
        register(Variant("element"))
    assert VARIANTS["element"].group(768, 0) == 1
