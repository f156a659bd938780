"""Philox4x32-10 and the decisions made from its words."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.dropout import philox
from pipeline.dropout.key import STEP_ROW_ID, derive_key
from pipeline.errors import DropoutError

VECTORS = json.loads(Path(__file__).with_name("mask_vectors.json").read_text())


def plain_philox(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Ten rounds, in Python's own integers."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("case", VECTORS["philox4x32_10"], ids=lambda case: case["words"][:8])
def test_words_are_the_known_answers_of_random123(case):
    low, high = case["key"]
    words = philox.philox4x32_10(low | high << 32, case["counter"])
    assert " ".join(f"{word:08x}" for word in words) == case["words"]


def test_many_counters_at_once_equal_a_plain_loop():
    random = np.random.default_rng(0)
    counters = random.integers(0, 2**32, (5, 7, 4))
    key = int(random.integers(0, 2**64, dtype=np.uint64))
    words = philox.philox4x32_10(key, counters.astype(np.uint32))
    plain = [[plain_philox(key, tuple(map(int, c))) for c in row] for row in counters]
    assert words.tolist() == plain


def test_lanes_are_the_halves_of_the_words_low_half_first():
    words = np.array([0x11112222, 0x33334444, 0x55556666, 0x77778888], dtype=np.uint32)
    expected = [0x2222, 0x1111, 0x4444, 0x3333, 0x6666, 0x5555, 0x8888, 0x7777]
    assert philox.lanes(words).tolist() == expected


@pytest.mark.parametrize("case", VECTORS["thresholds"], ids=lambda case: f"p={case['p']}")
def test_threshold_and_scale_are_the_published_ones(case):
    assert philox.threshold(case["p"]) == case["threshold"]
    assert philox.scale(case["threshold"]) == case["scale"]


@pytest.mark.parametrize("p", [-0.1, 1.0001, 2, float("nan"), float("inf")])
def test_a_rate_outside_0_and_1_is_refused(p):
    with pytest.raises(DropoutError, match="between 0 and 1"):
        philox.threshold(p)


@pytest.mark.parametrize("t", [-1, 65537])
def test_a_threshold_that_no_rate_gives_is_refused(t):
    with pytest.raises(DropoutError, match="between 0 and 65536"):
        philox.scale(t)


@pytest.mark.parametrize("case", VECTORS["uniform"], ids=lambda case: f"{case['value']:.3f}")
def test_a_scalar_decision_is_the_published_one(case):
    row_id = case.get("sample_id", STEP_ROW_ID)
    assert philox.uniform(derive_key(*case["arguments"]), row_id) == case["value"]


@pytest.mark.parametrize("case", VECTORS["permutation"], ids=lambda case: f"{case['rows']} rows")
def test_the_order_of_an_epoch_is_the_published_one(case):
    order = philox.permutation(case["seed"], case["epoch"], case["rows"])
    assert order.tolist() == case["order"]


def test_an_order_visits_each_row_once_by_its_words():
    key = derive_key(3, "order", 9, "permutation", "train", 0)
    words = [plain_philox(key, (0, 0, row, 0)) for row in range(500)]
    order = philox.permutation(3, 9, 500).tolist()
    assert order == sorted(range(500), key=lambda row: (words[row][1], words[row][0], row))


@pytest.mark.parametrize("num_rows", [0, 1])
def test_an_order_of_hardly_any_rows_is_no_special_case(num_rows):
    assert philox.permutation(0, 0, num_rows).tolist() == list(range(num_rows))
