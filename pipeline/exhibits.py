"""What a tracker can show besides numbers: pictures, binned curves, short tables, files.

The limits are those of Weights & Biases' charts (10,000 points) and of what a person reads (1,000
rows): curves are binned and tables chosen before they come here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MAX_POINTS = 10_000
MAX_ROWS = 1_000

Cell = str | int | float | bool | None
Severity = Literal["info", "warning", "critical"]


@dataclass(frozen=True)
class Picture:
    """A PNG file."""

    png: Path


@dataclass(frozen=True)
class Curve:
    """Binned lines over one x axis: (x, y) points by the line's name, `MAX_POINTS` in all."""

    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[float, float]]]

    def __post_init__(self) -> None:
        _require(sum(map(len, self.lines.values())), MAX_POINTS, "points", "bin them", self.title)


@dataclass(frozen=True)
class Table:
    """At most `MAX_ROWS` rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        _require(len(self.rows), MAX_ROWS, "rows", "choose the first of them", "A table")


Exhibit = Picture | Curve | Table


@dataclass(frozen=True)
class View:
    """A workspace: panels over what was logged, as W&B stores it."""

    name: str
    title: str
    specification: Mapping[str, Any]


@dataclass(frozen=True)
class Notice:
    """A message to people: what W&B sends on by e-mail or Slack."""

    title: str
    text: str
    severity: Severity = "warning"


def _require(number: int, limit: int, what: str, advice: str, name: str) -> None:
    if number > limit:
        raise ValueError(f"{name} has {number} {what}, but trackers take {limit}: {advice}.")
