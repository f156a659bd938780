"""When a schedule fires: pure functions of times, UTC."""

from datetime import UTC, datetime, timedelta

_LONG_AGO = datetime(2024, 1, 1, tzinfo=UTC)


def never_fires(cron: str) -> str | None:
    """Why a cron expression never fires; None when it does."""
    from croniter import CroniterBadDateError, CroniterError, croniter

    if len(cron.split()) != 5:
        return f"cron {cron!r} was to have five fields: minute, hour, day, month, day of the week"
    try:
        croniter(cron, _LONG_AGO).get_next(datetime)
    except CroniterBadDateError:
        return f"cron {cron!r} never fires: there is no such day"
    except CroniterError as error:
        return f"cron {cron!r} cannot be read: {error}"
    return None


def last_turn(
    now: datetime, since: datetime, every: timedelta | None, cron: str | None
) -> datetime | None:
    """The latest turn after `since` up to `now`: however many were missed, one is caught up on.

    Args:
        since: the last retraining; with `every`, turns are counted from it.
    """
    if every is not None:
        turns = (now - since) // every
        return since + turns * every if turns > 0 else None
    from croniter import croniter  # only policies with a cron line pay for it

    turn: datetime = croniter(cron, now + timedelta(seconds=1)).get_prev(datetime)
    return turn if since < turn <= now else None


def next_turn(
    now: datetime, since: datetime, every: timedelta | None, cron: str | None
) -> datetime:
    """The first turn after `now`."""
    if every is not None:
        return since + (max((now - since) // every, 0) + 1) * every
    from croniter import croniter

    turn: datetime = croniter(cron, now).get_next(datetime)
    return turn
