"""What is asked of a window, and what is found: plain frozen values, ready for JSON and metrics."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from monitoring.drift.statistics import TESTS, TestResult

Kind = Literal["numeric", "categorical", "embedding"]


@dataclass(frozen=True)
class DriftSettings:
    """How strictly a window is judged.

    About a numeric column the smallest p-value of the `numeric_tests` decides, times their number;
    about the others `categorical_test`; all tests are reported. `min_effects` overrides the
    smallest effect that counts, by test (also `mmd`): a large window makes any change significant,
    the effect says whether it matters. `ignore` names columns that change by nature: a time, a
    counter.
    """

    false_discovery_rate: float = 0.01
    min_rows: int = 50
    numeric_tests: Sequence[str] = ("ks", "tails")
    categorical_test: str = "chi2"
    min_effects: Mapping[str, float] = field(default_factory=dict)
    ignore: Collection[str] = ()
    num_permutations: int = 10_000
    max_embedding_rows: int = 2000
    confidence_level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        deciding = {name: test for name, test in TESTS.items() if test.decides}
        on_counts = {name for name, test in deciding.items() if test.on_counts}
        if not self.numeric_tests:
            raise ValueError("numeric_tests names at least one test; got none.")
        for name in self.numeric_tests:
            _require_known(name, deciding, "A numeric column")
        _require_known(self.categorical_test, on_counts, "A categorical column")
        for name in self.min_effects:
            _require_known(name, {*TESTS, "mmd"}, "An effect")


@dataclass(frozen=True)
class ColumnDrift:
    """One column of a window against the reference.

    `p_value` is the deciding one, `effect` that of the test `effect_name` which gave it;
    `adjusted_p_value` is after Benjamini-Hochberg over the columns of the window. The column
    drifted if that is at most the false discovery rate and the effect at least `min_effect`. All
    are None, and `tests` is empty, where `note` says why the column could not be judged. `mean` is
    that of a numeric column in the window.
    """

    column: str
    kind: Kind
    num_rows: int
    tests: dict[str, TestResult] = field(default_factory=dict)
    p_value: float | None = None
    adjusted_p_value: float | None = None
    effect: float | None = None
    effect_name: str | None = None
    min_effect: float | None = None
    drifted: bool = False
    mean: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Estimate:
    """A measure of quality with its interval, beside the same measure of the reference.

    `p_value`, where there is one, tests that the window and the reference agree.
    """

    estimate: float
    lower: float
    upper: float
    reference: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class WindowDrift:
    """A judged window.

    `performance` holds `accuracy`, `ece`, `nll` and `calibration_shift` where the window has
    labels, and `estimated_accuracy` where the profile has calibration bins.
    """

    num_rows: int
    num_labelled: int
    columns: list[ColumnDrift]
    performance: dict[str, Estimate]
    not_compared: dict[str, str] = field(default_factory=dict)

    @property
    def drifted(self) -> list[ColumnDrift]:
        """The columns that drifted, the smallest adjusted p-value first."""
        found = [column for column in self.columns if column.drifted]
        return sorted(found, key=lambda column: (column.adjusted_p_value, column.column))

    @property
    def embedding(self) -> ColumnDrift | None:
        """The embedding's entry among the columns, None without one."""
        return next((column for column in self.columns if column.kind == "embedding"), None)

    def metrics(self) -> dict[str, float]:
        """`drift/<column>/<measure>` and `drift/performance/<measure>`, numbers only."""
        metrics = {"drift/num_rows": float(self.num_rows)}
        metrics["drift/num_drifted_columns"] = float(len(self.drifted))
        for column in self.columns:
            for measure in ("p_value", "adjusted_p_value", "effect", "mean"):
                if (value := getattr(column, measure)) is not None:
                    metrics[f"drift/{column.column}/{measure}"] = value
            for name, test in column.tests.items():
                metrics[f"drift/{column.column}/{name}"] = test.statistic
        for name, found in self.performance.items():
            metrics[f"drift/performance/{name}"] = found.estimate
        return metrics

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON's own types."""
        return asdict(self)


def _require_known(test: str, known: Collection[str], subject: str) -> None:
    if test not in known:
        raise ValueError(f"{subject} is judged by one of {sorted(known)}; got {test!r}.")
