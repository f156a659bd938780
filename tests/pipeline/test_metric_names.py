"""The list of what is logged follows the code that computes it."""

from pipeline.evaluation.ood.registry import SCORES
from pipeline.metric_names import OOD_SCORES, TRAINING, is_listed


def test_every_score_of_the_evaluation_is_one_of_a_window():
    assert set(OOD_SCORES) == set(SCORES)


def test_a_star_stands_for_what_is_named_by_others():
    assert is_listed("eval/deterministic_accuracy", TRAINING)
    assert is_listed("train/loss", {}, TRAINING)
    assert not is_listed("train/accuracy", TRAINING)
