"""Words and lengths that the rows behind an alert have in common."""

import numpy as np

from monitoring.common_words import common_words, lengths

ORDINARY = [f"please transfer {n} dollars to my account" for n in range(200)]
STRANGE = [f"my pet dragon {n} has eaten the account" for n in range(20)]


def test_words_of_the_strange_rows_come_first():
    found = common_words(STRANGE, ORDINARY)
    assert {one.word for one in found} >= {"dragon", "pet", "eaten"}
    assert "account" not in {one.word for one in found}
    assert (found[0].share, found[0].other_share) == (1.0, 0.0)


def test_rows_like_the_others_have_nothing_in_common():
    random = np.random.default_rng(0)
    words = np.array([f"word{chr(97 + i)}{chr(97 + j)}" for i in range(10) for j in range(10)])
    texts = [" ".join(random.choice(words, 8)) for _ in range(400)]
    assert len(common_words(texts[:20], texts[20:])) <= 3  # z of 2.5 over a hundred words


def test_the_score_is_the_log_odds_ratio_over_its_deviation():
    (dragon,) = [one for one in common_words(STRANGE, ORDINARY) if one.word == "dragon"]
    prior = 10 * 20 / 220
    here, there = 20.5 + prior, 0.5 + prior
    ratio = np.log(here / (31 - here)) - np.log(there / (211 - there))
    assert np.isclose(dragon.z, ratio / np.sqrt(1 / here + 1 / there))


def test_one_long_row_counts_once():
    assert common_words(["spam " * 500, "a", "b"], ORDINARY) == []


def test_lengths_are_medians_and_need_both_sides():
    assert lengths([1, 2, 9], [5, 5]) == (2.0, 5.0)
    assert lengths([1], []) is None
    assert common_words(STRANGE, []) == []
