"""The first windows after a promotion: bad ones bring the champion before it back."""

import logging
from datetime import datetime
from pathlib import Path

from launch.retrain.evidence import WindowFact, read_windows
from launch.retrain.line import Line
from launch.retrain.policy import WatchPolicy
from launch.retrain.store import Retraining

logger = logging.getLogger(__name__)


def watched(line: Line) -> Retraining | None:
    """The promotion that is still being watched."""
    before = line.store.retrainings()
    last = before[-1] if before else None
    watching = last is not None and last.state == "promoted" and "watch" in last.facts
    return last if watching else None


def watch(line: Line, one: Retraining) -> Retraining:
    """Roll the promotion back, end the watch, or leave both for later windows."""
    policy, facts, version = line.plan.policy.watch, one.facts["watch"], one.facts["version"]
    if policy is None:
        return _over(line, one, "the policy has no watch any more")
    if (champion := line.registry.aliases().champion) != version:
        return _moved(line, one, champion)
    windows = read_windows(Path(facts["history"]), int(facts["after"]))[: policy.of_windows]
    bad = [window for window in windows if window.is_at_least(policy.severity)]
    if len(bad) >= policy.at_least:
        return _roll_back(line, one, bad, policy)
    if len(windows) >= policy.of_windows:
        return _over(line, one, f"{len(bad)} of {len(windows)} windows were bad: it stays")
    if line.now() >= datetime.fromisoformat(facts["until"]):
        return _over(line, one, f"no more than {len(windows)} windows came in time: it stays")
    return one


def _roll_back(
    line: Line, one: Retraining, bad: list[WindowFact], policy: WatchPolicy
) -> Retraining:
    said = f"{len(bad)} of its first windows raised a {policy.severity} alert"
    line.registry.rollback(said, expected_champion=one.facts["version"])
    evidence = [window.to_json() for window in bad]
    return line.end(_unwatched(one), "rolled back", said, bad_windows=evidence)


def _moved(line: Line, one: Retraining, champion: str | None) -> Retraining:
    """Somebody, or a tick that was killed before it could say so, moved the champion."""
    last = line.registry.journal()[-1:]
    if last and last[0]["action"] == "rollback" and last[0]["before"] == one.facts["version"]:
        return line.end(_unwatched(one), "rolled back", last[0]["reason"])
    return _over(line, one, f"the champion is {champion} by now")


def _over(line: Line, one: Retraining, said: str) -> Retraining:
    logger.info("The watch over %s is over: %s.", one.facts["version"], said)
    return line.store.move(_unwatched(one), "promoted", said)


def _unwatched(one: Retraining) -> Retraining:
    facts = {name: value for name, value in one.facts.items() if name != "watch"}
    return Retraining(**{**one.__dict__, "facts": facts})
