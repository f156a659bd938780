"""Reads what the stages left in a run folder; whatever is not there yet is empty."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import RunFolderError
from pipeline.records import RunFolder, read_jsonl


@dataclass(frozen=True)
class Run:
    """The records of one run."""

    name: str
    config: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the evaluation's report; empty where it does not apply."""
        return self.report.get(name) or {}

    def metric_keys(self, namespace: str) -> list[str]:
        """Names of the metrics of a namespace (`train/`), in the order of their first line."""
        keys = dict.fromkeys(key for row in self.metrics for key in row)
        return [key for key in keys if key.startswith(namespace)]

    def history(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every line that has a finite value for this metric."""
        return [
            (row["step"], row[key])
            for row in self.metrics
            if is_number(row.get("step")) and is_number(row.get(key))
        ]

    def samples_of(self, split: str) -> list[dict[str, Any]]:
        """The rows of one split."""
        return [row for row in self.samples if row.get("split") == split]


def load_run(folder: RunFolder) -> Run:
    """Everything that is there."""
    if not folder.path.is_dir():
        raise RunFolderError(
            f"No run folder {folder.path}: give the folder that `masklock train` has made."
        )
    return Run(
        name=folder.path.resolve().name,
        config=folder.config.read_text(encoding="utf-8") if folder.config.exists() else "",
        metrics=read_jsonl(folder.metrics) if folder.metrics.exists() else [],
        plan=_read_object(folder.plan),
        report=_read_object(folder.report_json),
        samples=_read_samples(folder.samples),
    )


def best_ood_score(folder: RunFolder) -> str | None:
    """The score that told the evaluation's out-of-distribution sets best, by its mean AUROC."""
    found: dict[str, list[float]] = {}
    for section in _read_object(folder.report_json).get("ood", {}).values():
        for score, figures in section["scores"].items():
            found.setdefault(score, []).append(figures["auroc"])
    return max(found, key=lambda score: sum(found[score]) / len(found[score]), default=None)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mean(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return sum(values) / len(values) if values else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is not JSON ({error}). Run its stage again.") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{path}: expected a JSON object. Run its stage again.")
    return content


def _read_samples(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    from pyarrow import parquet  # not at the top: `masklock --help` must stay fast

    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows
