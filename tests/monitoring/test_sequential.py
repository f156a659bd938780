"""The e-detector against a plain recursion, crepes' bets, and simulations of what it promises."""

import json
import math

import numpy as np
import pytest
from crepes.martingales import EpsilonBettingFunction

from monitoring.bounds import upper_mean_bound, value_score
from monitoring.sequential import EDetector, log_e_values
from pipeline.errors import DataError

MEAN = 1 / 9


def detector(length=100.0, direction="up", **bounds):
    bounds = {"mean_lower": MEAN, "mean_upper": MEAN, **bounds}
    return EDetector.start(average_run_length=length, direction=direction, spread=0.1, **bounds)


def run_length(state, windows):
    """Scheduled runs until the first alarm, one more than there are without one."""
    for number, window in enumerate(windows, start=1):
        state = state.update(window)
        if state.alarm:
            return number
    return number + 1


def plain_statistic(state, windows):
    """Mean over the bets of M, from their definition in plain numbers."""
    sums = [0.0] * len(state.bets)
    for window in windows:
        for place, bet in enumerate(state.bets):
            bound = state.mean_upper if bet > 0 else state.mean_lower
            sums[place] += 1
            for x in window:
                sums[place] *= 1 + bet * (x - bound)
    return sum(sums) / len(sums)


@pytest.mark.parametrize("direction", ["up", "down", "both"])
def test_the_statistic_follows_the_plain_recursion(direction):
    random = np.random.default_rng(1)
    windows = [random.beta(1, 8, random.integers(1, 20)) for _ in range(30)]
    state = detector(direction=direction, mean_lower=0.09, mean_upper=0.12)
    start = state
    for window in windows:
        state = state.update(window)
    assert state.statistic == pytest.approx(plain_statistic(start, windows))
    assert state.num_runs == 30


def test_bets_on_a_mean_of_a_half_pay_what_crepes_pays():
    state = EDetector.start(mean_lower=0.5, mean_upper=0.5, average_run_length=9, direction="both")
    p_values = np.random.default_rng(2).random(50)
    rewards = EpsilonBettingFunction(E=list(state.bets)).apply(p_values)
    np.testing.assert_allclose(np.exp(log_e_values(state, p_values)), rewards)


def test_a_detector_goes_on_from_json_to_the_same_bits():
    windows = np.random.default_rng(3).beta(1, 6, (40, 7))
    whole, resumed = detector(direction="both"), detector(direction="both")
    for window in windows:
        whole = whole.update(window)
        resumed = EDetector.from_json(json.loads(json.dumps(resumed.to_json()))).update(window)
    assert resumed == whole
    assert len(json.dumps(whole.to_json())) < 500


# Streams whose mean, given the past, is at the bound: the worst that the promise covers.
def independent(random):
    return random.beta(1, 8, random.integers(1, 6))


def zero_or_one(random):
    return (random.random(random.integers(1, 6)) < MEAN).astype(float)


def noise_that_depends_on_the_past():
    last = 1.0

    def window(random):
        nonlocal last
        spread = MEAN if last > MEAN else 0.3 * MEAN
        rows = MEAN + spread * random.choice([-1.0, 1.0], size=3)
        last = rows[-1]
        return rows

    return window


STREAMS = [independent, zero_or_one, noise_that_depends_on_the_past()]


@pytest.mark.parametrize("draw", STREAMS, ids=["independent", "zero or one", "dependent"])
@pytest.mark.parametrize("direction", ["up", "both"])
def test_runs_to_a_false_alarm_are_at_least_as_many_as_promised(draw, direction):
    random, length = np.random.default_rng(4), 20.0
    lengths = [
        run_length(detector(length, direction), (draw(random) for _ in range(400)))
        for _ in range(100)
    ]
    mean, error = np.mean(lengths), np.std(lengths) / np.sqrt(len(lengths))
    assert mean >= length - 3 * error
    # and P(alarm within w runs) <= w / A
    assert np.mean(np.array(lengths) <= 5) <= 5 / length + 3 * np.sqrt(0.25 * 0.75 / 100)


def test_an_estimated_mean_keeps_the_promise_as_often_as_its_bound_holds():
    random, false_alarms = np.random.default_rng(5), 0
    for _ in range(100):
        score = value_score(random.beta(1, 8, 100), error=0.05)
        state = detector(200.0, mean_lower=score.lower, mean_upper=score.upper)
        false_alarms += run_length(state, random.beta(1, 8, (20, 10))) <= 20
    # w / A = 0.1, and 0.05 for a bound that fails
    assert false_alarms <= 15 + 3 * math.sqrt(15)


def test_a_change_is_found_within_a_few_runs_in_either_direction():
    random = np.random.default_rng(6)
    state = detector(1000.0, "both")
    assert run_length(state, random.beta(2, 8, (50, 20))) <= 6
    assert run_length(state, random.beta(0.4, 8, (50, 20))) <= 12
    assert run_length(detector(1000.0, "up"), random.beta(0.4, 8, (50, 20))) == 51


def test_larger_windows_find_small_changes_in_fewer_runs():
    random = np.random.default_rng(7)
    small = run_length(detector(1000.0), random.beta(1.2, 8, (2000, 1)))
    large = run_length(detector(1000.0), random.beta(1.2, 8, (100, 300)))
    assert large <= 3 < small


def test_overwhelming_evidence_stays_finite():
    state = detector().update(np.ones(100_000)).update(np.ones(100_000))
    assert state.alarm
    assert math.isfinite(state.statistic)
    assert EDetector.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False))) == state


def test_a_run_without_rows_changes_nothing_and_a_restart_forgets():
    state = detector().update([0.4, 0.5])
    assert state.update([]) == state
    assert state.restart() == detector()
    assert detector().statistic == 0


@pytest.mark.parametrize("values", [[0.2, 1.1], [-0.1], [np.nan]])
def test_scores_outside_their_bounds_are_refused(values):
    with pytest.raises(DataError, match="between 0 and 1"):
        detector().update(values)


@pytest.mark.parametrize("bounds", [(0.3, 0.2), (-0.1, 0.2), (0.0, 0.0), (float("nan"), 0.5)])
def test_impossible_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds"):
        detector(mean_lower=bounds[0], mean_upper=bounds[1])


@pytest.mark.parametrize("change", [{"schema": "other"}, {"unknown": 1}])
def test_a_state_of_another_schema_is_refused(change):
    with pytest.raises(DataError, match="Start the detector anew"):
        EDetector.from_json(detector().to_json() | change)


def test_a_mean_that_no_row_can_exceed_raises_no_alarm():
    bound = upper_mean_bound([0.5], error=0.01)
    state = detector(2.0, mean_upper=bound)
    assert run_length(state, np.random.default_rng(8).beta(1, 8, (100, 5))) == 101
