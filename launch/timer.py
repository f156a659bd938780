"""Retraining on a timer of one machine: a systemd service with its timer, or a line of crontab."""

from dataclasses import dataclass
from pathlib import Path

from launch.schedule import Schedule
from launch.templates import render_template


@dataclass(frozen=True)
class Retraining:
    """What the timer starts."""

    name: str
    policy: Path
    directory: Path
    """Where it runs; everything it writes is below."""
    masklock: Path
    """The command itself: timers have no PATH of yours."""
    schedule: Schedule

    @property
    def unit(self) -> str:
        """Name of the service and the timer, without suffix."""
        return f"masklock-retrain-{self.name}"


def systemd_units(retraining: Retraining) -> dict[str, str]:
    """The service and the timer, by file name."""
    return {
        f"{retraining.unit}.{kind}": render_template(f"retrain.{kind}.j2", job=retraining)
        for kind in ("service", "timer")
    }


def cron_lines(retraining: Retraining) -> str:
    """The lines for `crontab -e`."""
    return render_template("crontab.j2", job=retraining)
