"""Few bad samples are set aside, many are an error; the decision follows from the data alone."""

import pytest

from pipeline.errors import DataError
from pipeline.modality.quarantine import BadSample, Quarantine


def judge(sample: dict) -> None:
    if (number := sample["sample_id"]) % 50 == 0:
        raise BadSample(f"{number} is round")


def numbered(start, stop):
    return [{"sample_id": number} for number in range(start, stop)]


def test_few_are_set_aside_with_id_and_reason():
    quarantine = Quarantine(budget=0.02)
    good = quarantine.usable("train", numbered(1, 101), judge)
    assert len(good) == 98
    assert [s.to_json() for s in quarantine.set_aside] == [
        {"split": "train", "sample_id": 50, "reason": "50 is round"},
        {"split": "train", "sample_id": 100, "reason": "100 is round"},
    ]
    assert quarantine.notes() == ["2 samples of train are set aside: see quarantine.jsonl"]


def test_more_than_the_budget_is_an_error_with_reasons():
    with pytest.raises(DataError, match=r"test: 2 of 100 samples cannot be used[\s\S]*sample 50"):
        Quarantine(budget=0.01).usable("test", numbered(1, 101), judge)


def test_a_refused_split_leaves_nothing_in_the_quarantine():
    quarantine = Quarantine(budget=0.0)
    with pytest.raises(DataError):
        quarantine.usable("test", numbered(50, 51), judge)
    assert quarantine.set_aside == []
