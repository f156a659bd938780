"""The e-detectors of a run: which columns they watch, their state from window to window, alarms.

One promise holds for all of them together: at most w / A false alarms in w scheduled runs, on
average, A the average run length. Each of m detectors sounds at m A and then starts anew. While
nothing changes a statistic grows by at most 1 a run on average, and every alarm takes m A away, so
that a detector sounds at most w / (m A) times.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitoring.bounds import SCORES, BoundedScore
from monitoring.profile import ReferenceProfile
from monitoring.scored import Window
from monitoring.sequential import EDetector
from pipeline.config.monitoring import DetectorConfig, SequentialConfig

BEST_OOD = "best_ood"
FloatArray = NDArray[np.float64]
ReadState = Callable[[str], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Detector:
    """One detector that this run can have: its reference knows the column."""

    config: DetectorConfig
    column: str
    score: BoundedScore
    start: EDetector
    basis: str
    """Hash of the reference values and of how they are read: a state of another basis is void."""


@dataclass(frozen=True)
class DetectorResult:
    """What one window did to a detector."""

    detector: Detector
    statistic: float
    """Of the threshold: an alarm at 1."""
    alarm: bool
    num_rows: int
    mean_score: float
    state: dict[str, Any]
    """To be kept for the next window."""


def detectors_of(
    config: SequentialConfig, profile: ReferenceProfile, best_ood: str | None
) -> dict[str, Detector]:
    """The detectors whose columns the reference knows, by name."""
    wanted = {
        name: (one, best_ood if one.column == BEST_OOD else one.column)
        for name, one in config.detectors.items()
        if one.enabled
    }
    known = {
        name: (one, column, reference)
        for name, (one, column) in wanted.items()
        if column is not None and len(reference := _reference(profile, column))
    }
    error = (1 - config.reference_confidence) / max(1, len(known))
    run_length = config.average_run_length * max(1, len(known))
    return {
        name: _detector(one, column, reference, error, run_length)
        for name, (one, column, reference) in known.items()
    }


def update(
    detectors: Mapping[str, Detector], window: Window, read_state: ReadState
) -> dict[str, DetectorResult]:
    """One scheduled run of every detector for which the window has values."""
    results = {}
    for name, detector in detectors.items():
        values = window.numbers(detector.column) if window.has(detector.column) else np.empty(0)
        if (known := values[np.isfinite(values)]).size:
            results[name] = _updated(detector, known, read_state(name))
    return results


def _updated(
    detector: Detector, values: FloatArray, saved: Mapping[str, Any] | None
) -> DetectorResult:
    state = detector.start
    if saved is not None and saved["basis"] == detector.basis:
        state = EDetector.from_json(saved["state"])
    scores = detector.score.of(values)
    state = state.update(scores)
    kept = state.restart() if state.alarm else state
    return DetectorResult(
        detector,
        statistic=state.statistic / state.average_run_length,
        alarm=state.alarm,
        num_rows=len(scores),
        mean_score=float(scores.mean()),
        state={"basis": detector.basis, "state": kept.to_json()},
    )


def _detector(
    config: DetectorConfig, column: str, reference: FloatArray, error: float, run_length: float
) -> Detector:
    sides = 2 if config.direction == "both" else 1
    score = SCORES[config.score](reference, error / sides)
    start = EDetector.start(
        mean_lower=score.lower,
        mean_upper=score.upper,
        average_run_length=run_length,
        direction=config.direction,
        spread=score.spread,
    )
    how = f"{column} {config.score} {start.to_json()}".encode()
    basis = hashlib.sha256(how + np.sort(reference).tobytes()).hexdigest()
    return Detector(config, column, score, start, basis)


def _reference(profile: ReferenceProfile, column: str) -> FloatArray:
    if column not in profile.sample.column_names:
        return np.empty(0)
    values = profile.sample_numbers(column)
    return values[np.isfinite(values)]
