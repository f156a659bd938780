"""The e-detectors of a run: one promise for all, states that go on, and void ones."""

import numpy as np
import pytest

from monitoring.detectors import detectors_of, update
from monitoring.profile import profile_of
from monitoring.scored import Window
from pipeline.config.monitoring import SequentialConfig


def window(table):
    return Window(table, (), "", {})


def run_on(detectors, tables):
    """Results after each of the tables, the states going from one to the next as JSON."""
    states = {}
    for table in tables:
        results = update(detectors, window(table), states.get)
        states |= {name: one.state for name, one in results.items()}
        yield results


@pytest.fixture(scope="module")
def profile(scored_rows):
    return profile_of(scored_rows(1000, seed=99, labelled=True), model_version="v1")


def test_the_run_length_is_shared_and_columns_that_are_not_there_are_left_out(profile):
    config = SequentialConfig(average_run_length=50)
    detectors = detectors_of(config, profile, "mahalanobis")
    assert detectors.keys() == {"uncertainty", "out_of_distribution", "doubt", "error"}
    assert {one.start.average_run_length for one in detectors.values()} == {200.0}
    assert detectors["out_of_distribution"].column == "mahalanobis"
    less = detectors_of(config, profile, None)
    assert {one.start.average_run_length for one in less.values()} == {150.0}


def test_alarms_of_all_detectors_together_keep_the_promise(profile, scored_rows):
    """P(an alarm within w runs) is at most w / A for the detectors together (Ville)."""
    length, num_runs, num_streams = 10, 3, 40
    config = SequentialConfig(average_run_length=length, reference_confidence=0.9)
    detectors = detectors_of(config, profile, "mahalanobis")
    sounded = 0
    for stream in range(num_streams):
        tables = [
            scored_rows(60, seed=1000 + 10 * stream + n, labelled=True) for n in range(num_runs)
        ]
        sounded += any(one.alarm for run in run_on(detectors, tables) for one in run.values())
    assert sounded / num_streams <= num_runs / length


def test_a_change_sounds_and_the_detector_starts_anew(profile, scored_rows):
    detectors = detectors_of(SequentialConfig(), profile, "mahalanobis")
    quiet, moved = scored_rows(200, seed=1), scored_rows(200, seed=2, moved=1, share=0.4)
    first, second = run_on(detectors, [quiet, moved])
    assert not any(one.alarm for one in first.values())
    assert second["out_of_distribution"].alarm
    assert second["out_of_distribution"].statistic >= 1
    assert set(second["out_of_distribution"].state["state"]["log_sums"]) == {None}


def test_evidence_too_weak_for_one_window_adds_up(profile, scored_rows):
    detectors = detectors_of(SequentialConfig(), profile, "mahalanobis")
    weak = [scored_rows(60, seed=seed, moved=1, share=0.15) for seed in range(12)]
    alarms = [run["out_of_distribution"].alarm for run in run_on(detectors, weak)]
    assert not alarms[0]
    assert any(alarms)


def test_rows_without_labels_say_nothing_about_errors(profile, scored_rows):
    detectors = detectors_of(SequentialConfig(), profile, None)
    [found] = run_on(detectors, [scored_rows(50, seed=1)])
    assert "error" not in found
    [found] = run_on(detectors, [scored_rows(50, seed=1, labelled=True)])
    assert found["error"].mean_score == np.mean(scored_rows(50, seed=1, labelled=True)["correct"])


def test_a_state_of_another_reference_is_void(profile, scored_rows):
    config, moved = SequentialConfig(), scored_rows(200, seed=2, moved=1, share=0.1)
    other = profile_of(scored_rows(1000, seed=98, labelled=True), model_version="v1")
    [before] = run_on(detectors_of(config, profile, None), [moved])
    state = before["doubt"].state
    fresh = update(detectors_of(config, other, None), window(moved), lambda name: None)
    after = update(detectors_of(config, other, None), window(moved), lambda name: state)
    assert after["doubt"].statistic == fresh["doubt"].statistic


def test_columns_of_the_user_are_watched_by_name(profile, scored_rows):
    clicks = {"column": "clicks", "direction": "down"}
    config = SequentialConfig(detectors={"clicks": clicks, "doubt": {"enabled": False}})
    detectors = detectors_of(config, profile, None)
    assert "doubt" not in detectors
    table = scored_rows(200, seed=3)
    few = table.set_column(table.column_names.index("clicks"), "clicks", [np.zeros(200)])
    [found] = run_on(detectors, [few])
    assert found["clicks"].alarm
