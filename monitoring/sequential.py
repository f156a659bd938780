"""Sequential alerts with a promise: how often they may sound while nothing has changed.

An e-detector (Shin, Ramdas, Rinaldo, "E-detectors: a nonparametric framework for sequential change
detection", New England Journal of Statistics in Data Science 2024) of the Shiryaev-Roberts kind.
Per bet b, once a scheduled run w with rows x_1..x_n in [0, 1]:

    E_w(b) = prod_i (1 + b (x_i - upper))   or, downward,   prod_i (1 + b (lower - x_i))
    M_w(b) = (M_{w-1}(b) + 1) E_w(b),       R_w = mean over the bets of M_w(b),   alarm: R_w >= A.

**Promise.** As long as each row's mean, given everything before it, lies in [lower, upper], each
E_w has an expectation of at most 1 given the past, so R_w - w is a supermartingale: the expected
number of runs to the first alarm is at least A, and P(alarm within w runs) <= w / A. Both hold for
any distribution, any windows' sizes (chosen before the window is seen) and any dependence that
leaves the conditional means alone. Rows drawn independently of the past from one distribution with
such a mean satisfy it. `lower` and `upper` are known only up to the reference rows: `monitoring.
bounds` gives them with an error probability, and the promise holds outside that error. It is a
promise about runs: alarms that stay up are one alarm; `restart` after a change was dealt with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from pipeline.errors import DataError

Direction = Literal["up", "down", "both"]
_SCHEMA = "masklock-e-detector-v1"

# Bets in units of 1 / spread. The one that grows fastest after a change by d spreads is about d;
# the smallest also sees changes of a tenth of that size, given large windows or time.
_BETS = (0.05, 0.15, 0.3, 0.5)


@dataclass(frozen=True)
class EDetector:
    """The whole state of a detector: what it was started with, and one float a bet.

    `bets` are positive upward and negative downward: the factor of a row is 1 + b (x - bound).
    `log_sums` holds log M of every bet, None for M = 0.
    """

    mean_lower: float
    mean_upper: float
    average_run_length: float
    bets: tuple[float, ...]
    log_sums: tuple[float | None, ...]
    num_runs: int = 0

    @classmethod
    def start(
        cls,
        *,
        mean_lower: float,
        mean_upper: float,
        average_run_length: float,
        direction: Direction = "up",
        spread: float | None = None,
    ) -> "EDetector":
        """A detector that has seen nothing.

        Args:
            mean_lower, mean_upper: bounds on the mean of a row without change, in [0, 1]
                (`monitoring.bounds`); only those of the direction matter.
            average_run_length: A: scheduled runs to a false alarm, on average at least.
            direction: of the change that matters.
            spread: standard deviation of the reference's scores; the bets aim at changes of
                some tenths of it. Without it, that of a score that is either 0 or 1.
        """
        _check_start(mean_lower, mean_upper, average_run_length)
        bets: list[float] = []
        if direction in ("up", "both"):
            bets += _bets(mean_upper, spread)
        if direction in ("down", "both"):
            bets += [-bet for bet in _bets(1 - mean_lower, spread)]
        return cls(mean_lower, mean_upper, average_run_length, tuple(bets), (None,) * len(bets))

    @property
    def statistic(self) -> float:
        """R, capped at the largest float."""
        return math.exp(min(self._log_statistic, 709.0))

    @property
    def alarm(self) -> bool:
        """Whether R has reached the average run length."""
        return self._log_statistic >= math.log(self.average_run_length)

    @property
    def _log_statistic(self) -> float:
        return float(logsumexp(_logs(self.log_sums)) - math.log(len(self.bets)))

    def update(self, values: ArrayLike) -> "EDetector":
        """The state after one scheduled run with these rows [N], each in [0, 1].

        A run without rows leaves the state as it is.
        """
        x = _unit_values(values)
        if len(x) == 0:
            return self
        grown = np.logaddexp(_logs(self.log_sums), 0.0) + log_e_values(self, x).sum(axis=0)
        return replace(self, log_sums=tuple(grown.tolist()), num_runs=self.num_runs + 1)

    def restart(self) -> "EDetector":
        """The same detector with its memory empty: after an alarm was dealt with."""
        return replace(self, log_sums=(None,) * len(self.bets), num_runs=0)

    def to_json(self) -> dict[str, Any]:
        """The state as JSON's own types; `from_json` gives back the very same floats."""
        return {
            "schema": _SCHEMA,
            "mean_lower": self.mean_lower,
            "mean_upper": self.mean_upper,
            "average_run_length": self.average_run_length,
            "bets": list(self.bets),
            "log_sums": list(self.log_sums),
            "num_runs": self.num_runs,
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "EDetector":
        """The detector that `to_json` wrote down."""
        names = {field.name for field in fields(cls)}
        if state.get("schema") != _SCHEMA or state.keys() != {"schema", *names}:
            raise DataError(
                f"A detector's state has schema {_SCHEMA!r} with {sorted(names)}; this one has "
                f"schema {state.get('schema')!r} with {sorted(state)}. Start the detector anew."
            )
        values = {name: state[name] for name in names}
        return cls(**values | {name: tuple(values[name]) for name in ("bets", "log_sums")})


def log_e_values(detector: EDetector, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(1 + b (x - bound)) of every row and bet, [N, number of bets]."""
    bets = np.array(detector.bets)
    bounds = np.where(bets > 0, detector.mean_upper, detector.mean_lower)
    return np.log1p(bets * (values[:, None] - bounds))


def _bets(mean: float, spread: float | None) -> list[float]:
    """Bets on a rise of a score with this mean, at most 3 / (4 mean): no factor comes near 0."""
    deviation = math.sqrt(mean * (1 - mean)) if spread is None else spread
    unit = min(1 / max(deviation, 1e-6), 0.75 / (mean * max(_BETS)))
    return [unit * share for share in _BETS]


def _logs(log_sums: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([-np.inf if value is None else value for value in log_sums])


def _check_start(lower: float, upper: float, average_run_length: float) -> None:
    if not (0 <= lower <= upper <= 1 and upper > 0 and lower < 1):
        raise ValueError(
            f"The mean without change lies between bounds in [0, 1]; got {lower} and {upper}."
        )
    if not (math.isfinite(average_run_length) and average_run_length >= 1):
        raise ValueError(
            f"The average run length is a number of runs, at least 1; got {average_run_length}."
        )


def _unit_values(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64).ravel()
    outside = ~((x >= 0) & (x <= 1))  # a NaN is outside
    if outside.any():
        raise DataError(
            f"A detector takes scores between 0 and 1; {int(outside.sum())} of {len(x)} are not, "
            f"the first is {x[outside][0]}. Bring the column there with `monitoring.bounds`."
        )
    return x
