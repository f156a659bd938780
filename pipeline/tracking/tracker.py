"""What a stage tells about itself, and the two trackers that only pass it on: to nobody, to all."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.exhibits import Exhibit, Notice


class Tracker(Protocol):
    """What a run tells about itself. Metric names are `namespace/metric`."""

    def start(self, config: Mapping[str, Any], run_name: str) -> None:
        """Begin, or go on with a run that was interrupted."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers that belong to this step (monitoring: to this window)."""

    def rewind(self, step: int) -> None:
        """Forget rows later than this step: the training resumes from there."""

    def show(self, name: str, exhibit: Exhibit) -> None:
        """Show a picture, a curve or a table, at the last step."""

    def artifact(self, kind: str, path: Path) -> None:
        """Keep a version of a file or folder of the run: its `profile`, its `report`."""

    def alert(self, notice: Notice) -> None:
        """Tell people. Waits until it is taken; ConnectionError where it is not."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record final numbers of the whole run."""

    def finish(self) -> str:
        """End, and say in one sentence how many rows arrived, or why not."""


class NullTracker:
    """Records nothing: processes other than the main one."""

    def start(self, config: Mapping[str, Any], run_name: str) -> None: ...
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def rewind(self, step: int) -> None: ...
    def show(self, name: str, exhibit: Exhibit) -> None: ...
    def artifact(self, kind: str, path: Path) -> None: ...
    def alert(self, notice: Notice) -> None: ...
    def summary(self, values: Mapping[str, Any]) -> None: ...
    def finish(self) -> str:
        """Nothing to say."""
        return ""


class TrackerGroup:
    """Tells every tracker the same."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def start(self, config: Mapping[str, Any], run_name: str) -> None:
        """Begin all."""
        for tracker in self.trackers:
            tracker.start(config, run_name)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record with all."""
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def rewind(self, step: int) -> None:
        """Rewind all."""
        for tracker in self.trackers:
            tracker.rewind(step)

    def show(self, name: str, exhibit: Exhibit) -> None:
        """Show with all."""
        for tracker in self.trackers:
            tracker.show(name, exhibit)

    def artifact(self, kind: str, path: Path) -> None:
        """Keep with all."""
        for tracker in self.trackers:
            tracker.artifact(kind, path)

    def alert(self, notice: Notice) -> None:
        """Alert by all."""
        for tracker in self.trackers:
            tracker.alert(notice)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Sum up with all."""
        for tracker in self.trackers:
            tracker.summary(values)

    def finish(self) -> str:
        """The sentences of all."""
        return " ".join(filter(None, [tracker.finish() for tracker in self.trackers]))
