"""Class by class, against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from monitoring.classes import MAX_CLASSES, by_class, confusion, hardest

NAMES = [f"class {number:02}" for number in range(30)]


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(3)
    labels = random.integers(30, size=600)
    predictions = np.where(random.random(600) < 0.6, labels, random.integers(29, size=600))
    return [
        {"label": NAMES[a], "prediction": NAMES[b]}
        for a, b in zip(labels, predictions, strict=True)
    ]


def test_precision_recall_and_f1_are_those_of_scikit_learn(rows):
    labels, predictions = ([row[name] for row in rows] for name in ("label", "prediction"))
    precision, recall, f1, count = precision_recall_fscore_support(
        labels, predictions, labels=NAMES, zero_division=0
    )
    found = by_class(rows)
    assert [one.label for one in found] == NAMES
    assert [one.precision or 0 for one in found] == pytest.approx(precision.tolist())
    assert [one.recall for one in found] == pytest.approx(recall.tolist())
    assert [one.f1 for one in found] == pytest.approx(f1.tolist())
    assert [one.num_rows for one in found] == count.tolist()


def test_confusion_is_that_of_scikit_learn(rows):
    labels, predictions = ([row[name] for row in rows] for name in ("label", "prediction"))
    names, counts = confusion(rows)
    assert names == NAMES
    assert np.array_equal(counts, confusion_matrix(labels, predictions, labels=NAMES))


def test_of_many_classes_the_hardest_are_shown_and_of_few_all_in_their_order(rows):
    every = by_class(rows)
    shown = hardest(every)
    assert len(shown) == MAX_CLASSES
    assert max(one.f1 for one in shown) <= min(one.f1 for one in every if one not in shown)
    assert hardest(every[:5]) == every[:5]


def test_rows_without_label_or_prediction_say_nothing():
    rows = [{"label": None, "prediction": "a"}, {"label": "a"}, {"perplexity": 3.0}]
    assert by_class(rows) == []


def test_what_a_class_is_taken_for_is_named_with_its_number():
    rows = [{"label": "a", "prediction": prediction} for prediction in "abbc"]
    assert by_class(rows)[0].taken_for == "b (2)"
