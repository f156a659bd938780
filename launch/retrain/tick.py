"""One tick, readable aloud: what a timer starts every few minutes."""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from launch.registry import Reach, Registry, utc_now
from launch.retrain.explain import explain
from launch.retrain.lease import held
from launch.retrain.line import DONE, Line
from launch.retrain.load import Plan
from launch.retrain.policy import duration
from launch.retrain.processes import Processes, Run
from launch.retrain.store import Clock, Retraining, Store
from launch.retrain.watch import watch, watched

logger = logging.getLogger(__name__)
Starter = Callable[[int], Run]
"""From the descriptor of the lock to what starts stages."""


def _pass_by(point: str) -> None:
    """Reached; nothing happens."""


def tick(
    plan: Plan,
    manual: bool = False,
    now: Clock = utc_now,
    starter: Starter | None = None,
    reach: Reach = _pass_by,
) -> int:
    """Look, and do what there is to do.

    Args:
        manual: start a retraining whatever the triggers find.
        starter: what starts stages; processes of this machine by default.
        reach: told the name of every point after which a kill leaves something behind; for tests.

    Returns:
        0 when done or nothing is to be done, 1 when a retraining failed, 75 to try later.

    Raises:
        BusyError: another tick is at work.
        InputError: the registry has no champion, or one that was changed.
    """
    with (
        closing(_store(plan, now, reach)) as store,
        held(store, now, plan.policy.limits.lease_seconds) as lock,
    ):
        run = (starter or _processes(plan))(lock)
        return _tick(Line(plan, store, _registry(plan, now, reach), run, now), manual)


def reasons(plan: Plan, now: Clock = utc_now) -> list[str]:
    """Where the line stands and what the next tick would do, in words."""
    with closing(_store(plan, now)) as store:
        return list(explain(Line(plan, store, _registry(plan, now), _refused, now)))


def interfere(plan: Plan, pause: bool, now: Clock = utc_now) -> str:
    """Pause or resume; says how it stands."""
    with closing(_store(plan, now)) as store:
        store.set("paused", now().isoformat(timespec="seconds") if pause else None)
    return f"{plan.policy.name} is {'paused: nothing happens until --resume' if pause else 'on'}."


def _tick(line: Line, manual: bool) -> int:
    if since := line.store.setting("paused"):
        logger.info("Paused since %s; masklock retrain %s --resume", since, line.plan.source)
        return DONE
    one = line.store.open_one()
    if one is None:
        if _is_watching(line) and not manual:
            return DONE
        one = _begin(line, manual)
    if one is None:
        return DONE
    one, code = line.advance(one)
    if not one.is_open:
        logger.info("Retraining %s is %s: %s", one.key[:8], one.state, one.reason)
    return code


def _is_watching(line: Line) -> bool:
    """Judge the windows after a promotion; whether there are more to come."""
    one = watched(line)
    if one is None:
        return False
    after = watch(line, one)
    if after.state == "rolled back":
        logger.info("%s was rolled back: %s", after.facts["version"], after.reason)
    return "watch" in after.facts


def _begin(line: Line, manual: bool) -> Retraining | None:
    one, _ = line.look(manual)
    if one is None:
        return None
    if not manual and (until := line.waits_until()):
        logger.info("Cooling down until %s: %s", until, one.trigger)
        return None
    logger.info("Triggered by %s", one.trigger)
    return line.store.begin(one)


def _processes(plan: Plan) -> Starter:
    limit = duration(plan.policy.limits.stage)
    return lambda lock: Processes(lock, limit)


def _refused(words: Sequence[str], log: Path) -> int:
    raise AssertionError("looking starts no stage")


def _store(plan: Plan, now: Clock, reach: Reach = _pass_by) -> Store:
    return Store(plan.folder / "state.sqlite", now, reach)


def _registry(plan: Plan, now: Clock, reach: Reach = _pass_by) -> Registry:
    return Registry(Path(plan.policy.registry), now, reach)
