"""Alerts out of what one window broke: their evidence, rows, and what a replay needs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from monitoring import columns
from monitoring.alert_files import KEPT, kept_name
from monitoring.alerts import Alert, alert_id
from monitoring.detectors import DetectorResult
from monitoring.drift import WindowDrift
from monitoring.evidence import extreme_rows
from monitoring.history import WindowRecord
from monitoring.profile import ReferenceProfile
from monitoring.rules import Finding
from monitoring.scored import Window
from pipeline.config.monitoring import MonitoringConfig, Severity

MAX_COLUMNS = 10
# What measures of quality are about, as a column of the window.
_OF_QUALITY = {"estimated_accuracy": "confidence", "ece": "confidence"}
_SAID = {
    "value": "its mean is {:.2f}",
    "rank": "its mean rank in the reference is {:.2f}",
    "tail": "{:.2f} of the rows are beyond the reference's 95 % quantile",
}
_REPLAYED = ("seed", "num_mc_passes", "plan_digest", "batch_size", "model_version", "task")


@dataclass(frozen=True)
class Raiser:
    """One judged window, about to raise alerts."""

    run_name: str
    config: MonitoringConfig
    profile: ReferenceProfile
    window: Window
    record: WindowRecord
    drift: WindowDrift

    @property
    def kept(self) -> Path:
        """Where, in the folder of monitoring, the window is kept for a replay."""
        return Path(KEPT) / kept_name(self.record.sha256, self.record.labelled)

    def of_rules(self, findings: Iterable[Finding]) -> list[Alert]:
        """An alert for each broken rule."""
        return [self._of_rule(finding) for finding in findings]

    def of_detectors(self, results: Mapping[str, DetectorResult]) -> list[Alert]:
        """An alert for each detector that sounds."""
        return [self._of_detector(name, one) for name, one in results.items() if one.alarm]

    def _of_rule(self, finding: Finding) -> Alert:
        rule = self.config.rules[finding.rule]
        evidence = {
            "metric": finding.metric,
            "value": finding.value,
            "baseline": finding.baseline,
            "broken_in": finding.broken_in,
            "of_windows": finding.looked_at,
            **self._drifted,
        }
        return self._alert(
            finding.rule,
            rule.severity,
            f"{finding.rule}: {finding.said}",
            self._column_of(finding.metric),
            {name: value for name, value in evidence.items() if value is not None},
            rule.runbook,
        )

    def _of_detector(self, name: str, result: DetectorResult) -> Alert:
        detector = result.detector
        evidence = {
            "metric": f"drift/sequential/{name}",
            "statistic": result.statistic * detector.start.average_run_length,
            "threshold": detector.start.average_run_length,
            "average_run_length": self.config.sequential.average_run_length,
            "score": detector.config.score,
            "mean_score": result.mean_score,
            "expected_at_least": detector.score.lower,
            "expected_at_most": detector.score.upper,
            "num_rows": result.num_rows,
        }
        verb = {"up": "has risen", "down": "has fallen", "both": "has moved"}
        said = _SAID[detector.config.score].format(result.mean_score)
        expected = f"{detector.score.lower:.2f} to {detector.score.upper:.2f} expected"
        return self._alert(
            f"sequential/{name}",
            detector.config.severity,
            f"{name}: {detector.column} {verb[detector.config.direction]}, {said}, {expected}",
            detector.column,
            evidence,
            detector.config.runbook,
        )

    def _alert(
        self,
        rule: str,
        severity: Severity,
        title: str,
        column: str | None,
        evidence: dict[str, Any],
        runbook: str,
    ) -> Alert:
        limit = self.config.max_rows_an_alert
        rows = extreme_rows(self.window, self.profile, column, limit)
        return Alert(
            id=alert_id(self.run_name, self.record.sha256, rule, evidence["metric"]),
            run=self.run_name,
            model_version=self.profile.model_version,
            created=self.record.created,
            severity=severity,
            rule=rule,
            title=title,
            column=column,
            evidence=evidence,
            rows=rows,
            window={
                "paths": self.record.paths,
                "sha256": self.record.sha256,
                "num_rows": self.record.num_rows,
                "kept": str(self.kept),
            },
            runbook=runbook,
            replay=self._replay([row["place"] for row in rows]),
        )

    def _replay(self, places: list[int]) -> dict[str, Any]:
        """Empty for rows that production scored itself: only the scorer can repeat them."""
        if not self.window.metadata or not places:
            return {}
        rows = self.window.table.take(places)
        scores = {
            name: rows.column(name).to_pylist()
            for name in self.profile.numbers
            if name in self.profile.own_columns and name not in columns.LABELLED
            if self.window.has(name)
        }
        return {name: self.window.metadata.get(name) for name in _REPLAYED} | {"scores": scores}

    def _column_of(self, metric: str) -> str | None:
        """The column whose rows stand behind a measure: its own, else the one that moved most."""
        parts = metric.split("/")
        if parts[:2] == ["drift", "performance"]:
            name = parts[2].removesuffix("_lower").removesuffix("_upper")
            return _OF_QUALITY.get(name, "correct")
        own = "/".join(parts[1:-1])
        if self.window.has(own):
            return own
        moved = [one.column for one in self.drift.drifted if self.window.has(one.column)]
        return moved[0] if moved else None

    @cached_property
    def _drifted(self) -> dict[str, Any]:
        moved = {
            one.column: {
                "test": one.effect_name,
                "effect": one.effect,
                "adjusted_p_value": one.adjusted_p_value,
            }
            for one in self.drift.drifted[:MAX_COLUMNS]
        }
        return {"drifted": moved} if moved else {}
