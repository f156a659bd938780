"""Says in words where a line of models stands, and what the next tick would do. Changes nothing."""

from collections.abc import Iterator

from launch.retrain.line import Line
from launch.retrain.store import Retraining
from launch.retrain.watch import watched
from pipeline.errors import RegistryError

_NUM_SHOWN = 5


def explain(line: Line) -> Iterator[str]:
    """One line a fact."""
    aliases = line.registry.aliases()
    yield f"champion    {aliases.champion or 'none'}; a rollback would return to {aliases.previous}"
    if since := line.store.setting("paused"):
        yield f"paused      since {since}: nothing happens until --resume"
    if (watching := watched(line)) is not None:
        watch = watching.facts["watch"]
        yield f"watching    {watching.facts['version']} until {watch['until']}"
    one = line.store.open_one()
    if one is not None:
        yield from _open(one)
    else:
        yield from _triggers(line)
    past = line.store.retrainings()
    for ended in [other for other in past if not other.is_open][-_NUM_SHOWN:]:
        yield f"{ended.state:<11} {ended.key[:8]} on {ended.changed}: {ended.reason}"


def _open(one: Retraining) -> Iterator[str]:
    yield f"{one.state:<11} {one.key[:8]} since {one.changed}; {one.trigger}"
    if one.not_before:
        yield f"waiting     until {one.not_before} after failure {one.failures}: {one.reason}"


def _triggers(line: Line) -> Iterator[str]:
    try:
        one, found = line.look()
    except RegistryError as error:
        yield f"cannot tell {error}"
        return
    for finding in found:
        yield f"{finding.trigger:<11} {'fires' if finding.fires else 'quiet'}: {finding.said}"
    until = line.waits_until()
    if until is not None:
        yield f"cooldown    until {until:%Y-%m-%d %H:%M} UTC"
    if one is None and any(finding.fires for finding in found):
        yield "next        nothing: that was retrained already"
    elif one is None:
        yield "next        nothing: no trigger fires"
    else:
        yield f"next        retraining {one.key[:8]}" + (", after the cooldown" if until else "")
