"""Is an alert what it was? Its rows, computed again, compared with what the alert says of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from monitoring.alerts import Alert
from monitoring.scored import read_window
from pipeline.errors import DataError
from pipeline.records import RunFolder

MAX_SHOWN = 10


@dataclass(frozen=True)
class Replay:
    """What a second computation gave: equal if nothing differs."""

    alert: str
    num_rows: int
    num_scores: int
    """Numbers compared, rows times columns."""
    differences: list[str] = field(default_factory=list)
    """One sentence each."""

    @property
    def equal(self) -> bool:
        """Bit for bit."""
        return not self.differences


def run_of(path: Path) -> RunFolder:
    """The run of an alert's file, which lies in monitoring/alerts/ of its folder."""
    folder = path.resolve().parent.parent
    if folder.name != "monitoring":
        raise DataError(
            f"{path} was to lie in monitoring/alerts/ of the run that raised it; only there are "
            f"the model and the rows to compute it again."
        )
    return RunFolder(folder.parent)


def kept_rows(run: RunFolder, alert: Alert) -> pa.Table:
    """The copy of the window that an alert was raised about.

    Raises:
        DataError: there is none any more, or its rows were not scored by Masklock.
    """
    if not alert.replay:
        raise DataError(
            f"Alert {alert.id} names no rows that Masklock scored: those that production scored "
            f"itself can only be computed again by production."
        )
    return read_window([run.monitoring / alert.window["kept"]]).table


def compare(
    alert: Alert, before: Mapping[str, Any], now: Mapping[str, Any], again: pa.Table
) -> Replay:
    """Compare facts (plan, model, masks) and every score of the alert's rows.

    Args:
        alert: what was raised.
        before: facts of then, by name.
        now: the same facts of today.
        again: the alert's rows, scored once more, in its order.
    """
    scores = alert.replay["scores"]
    facts = [
        f"{name} was {value}, is {now.get(name)}"
        for name, value in before.items()
        if now.get(name) != value
    ]
    numbers = [sentence for name in scores for sentence in _differing(name, alert, again)]
    hidden = len(numbers) - MAX_SHOWN
    shown = [*facts, *numbers[:MAX_SHOWN], *([f"and {hidden} more"] if hidden > 0 else [])]
    return Replay(alert.id, len(alert.rows), len(alert.rows) * len(scores), shown)


def _differing(name: str, alert: Alert, again: pa.Table) -> list[str]:
    """Rows whose value of this score is another one."""
    before: Sequence[Any] = alert.replay["scores"][name]
    if name not in again.column_names:
        return [f"{name} is not computed any more"]
    return [
        f"{name} of sample {row['sample_id']} was {old!r}, is {new!r}"
        for row, old, new in zip(alert.rows, before, again.column(name).to_pylist(), strict=True)
        if not _same(old, new)
    ]


def _same(old: Any, new: Any) -> bool:
    both_nan = all(isinstance(one, float) and math.isnan(one) for one in (old, new))
    return both_nan or old == new
