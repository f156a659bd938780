"""What is asked of a window, and what is found: plain frozen values, ready for JSON and metrics."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["numeric", "categorical", "embedding"]

# The smallest effect that counts, by test. A p-value says that a change is real, the effect whether
# it matters: a large window makes any change significant.
MIN_EFFECTS: Mapping[str, float] = {
    "ks": 0.05,
    "cramer_von_mises": 0.03,
    "wasserstein": 0.1,
    "chi2": 0.1,
    "psi": 0.1,
    "jensen_shannon": 0.1,
    "mmd": 0.03,
}


@dataclass(frozen=True)
class DriftSettings:
    """How strictly a window is judged.

    `numeric_test` and `categorical_test` name the test whose p-value decides; the others are
    reported beside it. `min_effects` overrides single entries of `MIN_EFFECTS`.
    """

    false_discovery_rate: float = 0.01
    min_rows: int = 50
    numeric_test: str = "ks"
    categorical_test: str = "chi2"
    min_effects: Mapping[str, float] = field(default_factory=dict)
    num_permutations: int = 1000
    max_embedding_rows: int = 2000
    confidence_level: float = 0.95
    seed: int = 0

    def min_effect(self, test: str) -> float:
        """The smallest effect of this test that counts as drift."""
        return self.min_effects.get(test, MIN_EFFECTS[test])


@dataclass(frozen=True)
class TestResult:
    """One test of one column. `p_value` is None for a distance without a test."""

    statistic: float
    p_value: float | None
    effect: float

    __test__ = False  # not a test of pytest's


@dataclass(frozen=True)
class ColumnDrift:
    """One column of a window against the reference.

    `p_value` is that of the deciding test `decided_by`; `adjusted_p_value` is after
    Benjamini-Hochberg over the columns of the window. All are None, and `tests` is empty, where
    `note` says why the column could not be judged.
    """

    column: str
    kind: Kind
    num_rows: int
    tests: dict[str, TestResult] = field(default_factory=dict)
    decided_by: str | None = None
    p_value: float | None = None
    adjusted_p_value: float | None = None
    effect: float | None = None
    effect_name: str | None = None
    drifted: bool = False
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
            for measure in ("p_value", "adjusted_p_value", "effect"):
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
