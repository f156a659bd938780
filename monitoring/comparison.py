"""Two evaluated runs on the same samples and the same masks: paired differences with intervals.

Judges samples tables, as the evaluation leaves them. b - a throughout: a is what there was.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from monitoring.paired_bootstrap import (
    Interval,
    Statistic,
    auroc_of,
    calibration_error_of,
    exp_of_mean,
    mean_of,
    percentile_interval,
    resampled,
    simultaneous_intervals,
)
from monitoring.paired_rows import RETENTION, TEST, MissingNumbers, Pair, paired
from monitoring.slices import slices_of
from pipeline.errors import RunFolderError
from pipeline.records import RunFolder

SCHEMA = "masklock-comparison-v1"
_BOTH_SCORES = (
    *("mahalanobis", "knn"),
    *("mc_predictive_entropy", "mc_expected_entropy", "mc_mutual_information"),
)
OOD_SCORES = {
    "classes": ("msp", "max_logit", "energy", "entropy", "mc_msp", "mc_disagreement"),
    "tokens": ("surprise", "token_entropy", "mc_surprise"),
}
OOD_SCORES = {kind: (*own, *_BOTH_SCORES) for kind, own in OOD_SCORES.items()}
"""Scores that tell other rows from the test rows, by what a task predicts."""
OOD = "ood:"
Both = tuple[Statistic, Statistic]


@dataclass(frozen=True, eq=False)
class Side:
    """One evaluated run: its samples, and what its masks were drawn from."""

    name: str
    samples: pa.Table
    seed: int | None = None
    num_passes: int | None = None
    plan_digest: str | None = None


@dataclass(frozen=True)
class Difference:
    """A metric of both runs on the same rows, and b - a with its bootstrap interval."""

    metric: str
    a: float
    b: float
    estimate: float
    lower: float
    upper: float
    num_rows: int
    higher_is_better: bool

    @property
    def outcome(self) -> str:
        """`better` or `worse` when the whole interval says so, else `even`."""
        sign = 1 if self.higher_is_better else -1
        if min(sign * self.lower, sign * self.upper) > 0:
            return "better"
        return "worse" if max(sign * self.lower, sign * self.upper) < 0 else "even"


@dataclass(frozen=True)
class Comparison:
    """What two runs differ in."""

    run_a: str
    run_b: str
    num_rows: int
    num_unpaired: int
    """Rows of all sets that only one run has; they are left out."""
    fingerprint: str
    """sha256 over ids, texts and labels of the compared rows."""
    same_masks: bool
    confidence_level: float
    metrics: tuple[Difference, ...] = ()
    """One at a time."""
    slices: tuple[Difference, ...] = ()
    """Of the rows of a group each; these intervals hold all at once."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Metrics that cannot be compared, and why."""
    notes: tuple[str, ...] = ()

    def metric(self, name: str) -> Difference | None:
        """One metric, None where it is missing."""
        return next((one for one in self.metrics if one.metric == name), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        shown = asdict(self)
        for part in ("metrics", "slices"):
            shown[part] = [asdict(one) | {"outcome": one.outcome} for one in getattr(self, part)]
        return {"schema": SCHEMA} | shown


def read_side(run: RunFolder) -> Side:
    """What the evaluation of a run left.

    Raises:
        RunFolderError: the run was not evaluated.
    """
    if not (run.samples.is_file() and run.report_json.is_file()):
        raise RunFolderError(
            f"{run.path} was to be compared, but its evaluation is missing. "
            f"Evaluate it first: masklock evaluate {run.path}"
        )
    from pyarrow import parquet  # not at the top: it costs a tenth of a second

    report = json.loads(run.report_json.read_text(encoding="utf-8"))
    plan = json.loads(run.plan.read_text(encoding="utf-8")) if run.plan.is_file() else {}
    passes = (report.get("mc") or {}).get("num_passes")
    samples = parquet.read_table(run.samples)
    return Side(str(run.path), samples, report.get("seed"), passes, plan.get("digest"))


def compare_runs(
    a: Side,
    b: Side,
    *,
    retention: Mapping[str, range] | None = None,
    num_resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare b with a on the test rows that both have.

    Args:
        retention: sample ids by name of rows apart from the others: `retention/<name>/...`.
        seed: of the resampling.

    Raises:
        DataError: the runs have no sample in common, or the same ids stand for other rows.
    """
    pairs, notes = paired(a.samples, b.samples, retention or {})
    both, missing = _statistics(pairs)
    sizes = {name: pair.num_rows for name, pair in pairs.items()}
    values = resampled(both, sizes, num_resamples, seed)
    same_masks, said = _masks(a, b)
    return Comparison(
        run_a=a.name,
        run_b=b.name,
        num_rows=sizes[TEST],
        num_unpaired=a.samples.num_rows + b.samples.num_rows - 2 * sum(sizes.values()),
        fingerprint=pairs[TEST].fingerprint,
        same_masks=same_masks,
        confidence_level=confidence_level,
        metrics=tuple(
            _difference(name, percentile_interval(found, confidence_level), _rows(name, sizes))
            for name, found in values.items()
        ),
        slices=_sliced(pairs[TEST], num_resamples, confidence_level, seed),
        missing=missing,
        notes=(*notes, *said),
    )


def _statistics(pairs: Mapping[str, Pair]) -> tuple[dict[str, Both], dict[str, str]]:
    """The statistic of a and of b by metric; metrics that cannot be had, and why."""
    found: dict[str, Both] = {}
    missing: dict[str, str] = {}
    for name, make in _metrics(pairs):
        try:
            found[name] = make()
        except MissingNumbers as reason:
            missing[name] = str(reason)
    return found, missing


def _metrics(pairs: Mapping[str, Pair]) -> Iterator[tuple[str, Callable[[], Both]]]:
    test = pairs[TEST]
    for rows, pair in pairs.items():
        if rows == TEST or rows.startswith(RETENTION):
            prefix = "" if rows == TEST else f"{rows}/"
            for name, make in QUALITY[_kind(pair)].items():
                yield f"{prefix}{name}", partial(make, rows, pair)
        else:
            for score in _ood_scores(test):
                name = f"ood/{rows.removeprefix(OOD)}/{score}"
                yield name, partial(_auroc, rows, test, pair, score)


def _kind(pair: Pair) -> str:
    return "classes" if pair.has("correct") else "tokens"


def _ood_scores(test: Pair) -> list[str]:
    names = dict.fromkeys(test.a.column_names + test.b.column_names)
    return [name for name in names if name in OOD_SCORES[_kind(test)]]


def _accuracy(rows: str, pair: Pair) -> Both:
    a, b = pair.numbers("correct")
    return mean_of(rows, a), mean_of(rows, b)


def _class_nll(rows: str, pair: Pair) -> Both:
    a, b = pair.numbers("label_log_probability")
    return mean_of(rows, -a), mean_of(rows, -b)


def _ece(rows: str, pair: Pair) -> Both:
    confidence, correct = pair.numbers("confidence"), pair.numbers("correct")
    of_a, of_b = zip(confidence, correct, strict=True)
    return calibration_error_of(rows, *of_a), calibration_error_of(rows, *of_b)


def _token_nll(rows: str, pair: Pair) -> Both:
    (a, b), (tokens_a, tokens_b) = pair.numbers("log_probability"), pair.numbers("num_tokens")
    return mean_of(rows, -a, tokens_a), mean_of(rows, -b, tokens_b)


def _perplexity(rows: str, pair: Pair) -> Both:
    (a, b), (tokens_a, tokens_b) = pair.numbers("log_probability"), pair.numbers("num_tokens")
    return exp_of_mean(rows, -a, tokens_a), exp_of_mean(rows, -b, tokens_b)


def _auroc(rows: str, test: Pair, outside: Pair, score: str) -> Both:
    (in_a, in_b), (out_a, out_b) = test.numbers(score), outside.numbers(score)
    return auroc_of((TEST, rows), in_a, out_a), auroc_of((TEST, rows), in_b, out_b)


QUALITY: dict[str, dict[str, Callable[[str, Pair], Both]]] = {
    "classes": {"accuracy": _accuracy, "nll": _class_nll, "ece": _ece},
    "tokens": {"nll": _token_nll, "perplexity": _perplexity},
}
"""Metrics of labelled rows, by what a task predicts."""


def _sliced(
    test: Pair, num_resamples: int, confidence_level: float, seed: int
) -> tuple[Difference, ...]:
    """The first metric of quality, slice by slice."""
    name, column = (
        ("accuracy", "correct") if _kind(test) == "classes" else ("nll", "log_probability")
    )
    masks = slices_of(test)
    try:
        a, b = test.numbers(column)
        tokens = test.numbers("num_tokens")[0] if name == "nll" else np.ones(test.num_rows)
    except MissingNumbers:
        return ()  # said by the metric itself
    if not masks:
        return ()
    sign = -1 if name == "nll" else 1
    both = {
        f"{name}[{label}]": (
            mean_of(TEST, sign * a, tokens * mask),
            mean_of(TEST, sign * b, tokens * mask),
        )
        for label, mask in masks.items()
    }
    values = resampled(both, {TEST: test.num_rows}, num_resamples, seed)
    rows = {f"{name}[{label}]": int(mask.sum()) for label, mask in masks.items()}
    intervals = simultaneous_intervals(values, confidence_level)
    return tuple(_difference(label, found, rows[label]) for label, found in intervals.items())


def _difference(name: str, interval: Interval, num_rows: int) -> Difference:
    last = name.partition("[")[0].rpartition("/")[2]
    return Difference(
        metric=name,
        a=interval.a,
        b=interval.b,
        estimate=interval.estimate,
        lower=interval.lower,
        upper=interval.upper,
        num_rows=num_rows,
        higher_is_better=last not in ("ece", "nll", "perplexity"),
    )


def _rows(metric: str, sizes: Mapping[str, int]) -> int:
    """Rows behind a metric; of an AUROC those outside."""
    family, _, rest = metric.partition("/")
    inner = rest.rpartition("/")[0]
    return sizes[{"ood": f"{OOD}{inner}", "retention": f"{RETENTION}{inner}"}.get(family, TEST)]


def _masks(a: Side, b: Side) -> tuple[bool, list[str]]:
    facts: dict[str, tuple[Any, Any]] = {
        "seed": (a.seed, b.seed),
        "number of passes": (a.num_passes, b.num_passes),
        "dropout plan": (a.plan_digest, b.plan_digest),
    }
    notes = [
        f"Other masks: the {name} is {of_a} in the first run and {of_b} in the second, so "
        "differences hold the noise of both"
        for name, (of_a, of_b) in facts.items()
        if of_a != of_b
    ]
    return not notes, notes
