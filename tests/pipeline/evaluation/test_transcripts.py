"""Error rates of transcripts against jiwer over whole sets, curves against a plain loop."""

import jiwer
import numpy as np
import pytest

from pipeline.evaluation.metrics import compute_metric
from pipeline.evaluation.transcripts import Edits, character_edits, rejection_curve, word_edits

REFERENCES = ["one two three", "four", "five  six", " seven eight nine ten ", "ünder straße"]
HYPOTHESES = ["one three three", "", "five six and more", "seven nine ten", "under strasse"]


def drawn(count: int) -> Edits:
    generator = np.random.default_rng(4)
    return Edits(generator.integers(0, 5, count), generator.integers(1, 9, count))


def test_rates_are_those_of_jiwer_over_the_whole_set():
    assert compute_metric("wer", HYPOTHESES, REFERENCES) == {
        "wer": jiwer.wer(REFERENCES, HYPOTHESES)
    }
    assert compute_metric("cer", HYPOTHESES, REFERENCES) == {
        "cer": jiwer.cer(REFERENCES, HYPOTHESES)
    }


def test_sums_of_parts_give_the_rate_of_the_whole():
    whole = word_edits(HYPOTHESES, REFERENCES)
    parts = [word_edits(HYPOTHESES[a:b], REFERENCES[a:b]) for a, b in ((0, 2), (2, 5))]
    edits, words = (sum(getattr(p, n).sum() for p in parts) for n in ("edits", "lengths"))
    assert edits / words == whole.rate == jiwer.wer(REFERENCES, HYPOTHESES)
    assert whole.edits.tolist() == [1, 1, 2, 1, 2]
    assert whole.lengths.tolist() == [3, 1, 2, 4, 2]


def test_characters_are_counted_with_blanks_inside():
    found = character_edits(["ab d", ""], ["ab cd", "xyz"])
    assert found.edits.tolist() == [1, 3]
    assert found.lengths.tolist() == [5, 3]


def test_the_interval_is_that_of_a_bootstrap_by_utterance():
    edits, generator = drawn(200), np.random.default_rng(0)
    rows = generator.integers(200, size=(4000, 200))
    rates = edits.edits[rows].sum(1) / edits.lengths[rows].sum(1)
    own = edits.interval(seed=1, num_resamples=4000)
    assert np.allclose(own, np.quantile(rates, [0.025, 0.975]), atol=0.02)
    assert own[0] < edits.rate < own[1]


def test_the_curve_is_the_rate_of_what_each_threshold_keeps():
    edits, confidence = drawn(60), np.random.default_rng(1).integers(0, 12, 60) / 12
    curve = rejection_curve(edits, confidence)
    for place, threshold in enumerate(sorted(set(confidence), reverse=True)):
        kept = confidence >= threshold
        assert curve.coverage[place] == pytest.approx(kept.mean())
        expected = edits.edits[kept].sum() / edits.lengths[kept].sum()
        assert curve.rate[place] == pytest.approx(expected)
    assert curve.coverage[-1] == 1
    assert curve.rate[-1] == pytest.approx(edits.rate)


def test_a_confidence_that_knows_all_has_the_area_of_the_oracle_and_no_other_less():
    edits = drawn(300)
    known = rejection_curve(edits, -edits.edits / edits.lengths)
    assert known.excess_area == 0
    blind = rejection_curve(edits, np.random.default_rng(2).normal(size=300))
    wrong = rejection_curve(edits, edits.edits / edits.lengths)
    assert 0 < blind.excess_area < wrong.excess_area
    assert blind.area == pytest.approx(edits.rate, abs=0.1)


def test_one_confidence_for_all_says_nothing():
    edits = drawn(20)
    curve = rejection_curve(edits, np.zeros(20))
    assert curve.coverage.tolist() == [1]
    assert curve.area == pytest.approx(edits.rate)


@pytest.mark.parametrize(
    ("hypotheses", "references", "said"),
    [
        (["a"], ["a", "b"], "1 hypotheses and 2 references"),
        (["a", "b"], ["a", "  "], "1 of 2 have none, the first is number 1"),
        ([], [], "0 of 0 have none"),
    ],
)
def test_what_has_no_rate_is_refused(hypotheses, references, said):
    with pytest.raises(ValueError, match=said):
        word_edits(hypotheses, references)


def test_a_confidence_that_is_missing_is_refused():
    with pytest.raises(ValueError, match="for 3 utterances, 1 not finite"):
        rejection_curve(drawn(3), [0.5, np.nan, 0.1])
