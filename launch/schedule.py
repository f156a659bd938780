"""How often retraining looks whether there is something to do: one interval, three spellings.

Cron, systemd and Kubernetes all count from midnight UTC, so that a missed turn moves no later one.
"""

from dataclasses import dataclass

from pipeline.errors import InputError

# Intervals that divide an hour or a day, and so come back at the same times of every day.
_CRON = {f"{n}m": f"*/{n} * * * *" for n in (5, 10, 15, 20, 30)}
_CRON |= {"1h": "0 * * * *"} | {f"{n}h": f"0 */{n} * * *" for n in (2, 3, 4, 6, 8, 12)}
_CRON |= {"1d": "0 0 * * *", "7d": "0 0 * * 1"}
_CALENDAR = {f"{n}m": f"*:0/{n}" for n in (5, 10, 15, 20, 30)}
_CALENDAR |= {"1h": "hourly"} | {f"{n}h": f"0/{n}:00" for n in (2, 3, 4, 6, 8, 12)}
_CALENDAR |= {"1d": "daily", "7d": "weekly"}


@dataclass(frozen=True)
class Schedule:
    """An interval such as `15m`, `6h` or `1d`."""

    every: str

    def __post_init__(self) -> None:
        if self.every not in _CRON:
            raise InputError(f"--every {self.every}: choose one of {', '.join(_CRON)}.")

    @property
    def cron(self) -> str:
        """Five fields of cron."""
        return _CRON[self.every]

    @property
    def calendar(self) -> str:
        """`OnCalendar` of a systemd timer."""
        return f"{_CALENDAR[self.every]} UTC"
