"""The `monitoring:` section: how production windows are judged, what raises an alert, and who is told.

Nothing has to be set to start. The string under a field is its documentation.
"""

import ipaddress
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipeline.config.roles import PositiveInt, Section

Severity = Literal["info", "warning", "critical"]
Effect = Literal[
    "ks", "cramer_von_mises", "tails", "wasserstein", "chi2", "psi", "jensen_shannon", "mmd"
]
NumericTest = Literal["ks", "cramer_von_mises", "chi2", "tails"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class DriftConfig(Section):
    """How each column of a window is compared with the reference profile."""

    false_discovery_rate: Share = 0.01
    """Benjamini-Hochberg level over the columns of one window."""
    min_rows: PositiveInt = 50
    """Windows with fewer rows are recorded, but their columns are not tested."""
    numeric_tests: Annotated[list[NumericTest], Field(min_length=1)] = ["ks", "tails"]
    """The tests that decide for columns of numbers, corrected for their number; the others are reported beside them."""
    categorical_test: Literal["chi2"] = "chi2"
    """The test that decides for columns of names."""
    min_effects: dict[Effect, Annotated[float, Field(ge=0)]] = {}
    """Smallest effect size by test that counts as drift, however small the p-value, such as `{ks: 0.1}`."""
    ignore: list[str] = []
    """Columns that change by nature and are not compared, such as a time."""
    num_permutations: PositiveInt = 10_000
    """Most permutations behind the p-value of the embeddings; a thousand where they differ little."""


class DetectorConfig(Section):
    """One e-detector: a column of the scored rows, brought to [0, 1], and the direction that is bad."""

    column: str
    """A numeric column, one of yours too; `best_ood` is the OOD score with the best AUROC in the evaluation."""
    score: Literal["value", "rank", "tail"] = "rank"
    """`rank`: share of reference rows below; `tail`: 1 above the reference's 95 % quantile; `value`: the column itself, which lies in [0, 1]."""
    direction: Literal["up", "down", "both"] = "up"
    """Of the change that matters."""
    severity: Severity = "critical"
    """How serious an alarm is."""
    runbook: str = ""
    """One line: what to do after an alarm."""
    enabled: bool = True
    """false switches a detector off, a built-in one too."""


BUILT_IN_DETECTORS: dict[str, dict[str, Any]] = {
    "uncertainty": {
        "column": "mutual_information",
        "runbook": "The passes disagree more than they did: read the rows; label some and retrain.",
    },
    "out_of_distribution": {
        "column": "best_ood",
        "score": "tail",
        "runbook": "More inputs of a kind the training has not seen: read the rows, find their source.",
    },
    "doubt": {
        "column": "confidence",
        "direction": "down",
        "runbook": "The model is less sure than it was: read the rows; has the mix of inputs changed?",
    },
    "error": {
        "column": "correct",
        "score": "value",
        "direction": "down",
        "runbook": "More wrong answers than the reference had: check labels, then retrain or roll back.",
    },
}


class SequentialConfig(Section):
    """E-detectors: alarms over many windows, with a promise about false ones."""

    average_run_length: Annotated[float, Field(ge=1)] = 1000.0
    """Scheduled runs between two false alarms, on average at least, for all detectors together."""
    reference_confidence: Share = 0.99
    """Probability with which all bounds on the reference's means hold, on which the promise rests."""
    detectors: dict[str, DetectorConfig] = Field(default={}, validate_default=True)
    """Detectors by a name of yours, beside the built-in ones; the name of a built-in one changes it."""

    @model_validator(mode="before")
    @classmethod
    def _with_built_in_detectors(cls, data: Any) -> Any:
        return _with_built_in(data, "detectors", BUILT_IN_DETECTORS)


class RuleConfig(Section):
    """A threshold, a change, or either of them in k of the last n windows, over one measure."""

    metric: str
    """A measure of a window, such as `drift/num_drifted_columns`, `drift/COLUMN/effect`, `drift/COLUMN/mean`, `drift/performance/accuracy`, `drift/performance/accuracy_upper` (of its interval); `*` matches any part."""
    above: float | None = None
    """Broken where the measure is greater."""
    below: float | None = None
    """Broken where the measure is less."""
    rises_by: Positive | None = None
    """Broken where the measure exceeds its baseline by this share of it: 0.1 is ten percent."""
    falls_by: Positive | None = None
    """Broken where the measure is below its baseline by this share of it."""
    baseline: Literal["reference", "previous"] = "reference"
    """What `rises_by` and `falls_by` compare with: the reference profile, or the mean of the previous windows."""
    in_windows: PositiveInt = 1
    """k: alert where the rule is broken in this window and in at least so many ..."""
    of_windows: PositiveInt = 1
    """n: ... of the last so many windows that have the measure, this one among them."""
    min_rows: PositiveInt = 1
    """Windows with fewer rows (for quality: fewer labels) say nothing about this rule."""
    severity: Severity = "warning"
    """How serious it is."""
    runbook: str = ""
    """One line: what to do when it is broken."""
    enabled: bool = True
    """false switches a rule off, a built-in one too."""

    @model_validator(mode="after")
    def _pairs(self) -> "RuleConfig":
        problems = []
        bounds = (self.above, self.below, self.rises_by, self.falls_by)
        if all(bound is None for bound in bounds):
            problems.append("give at least one of above, below, rises_by and falls_by")
        if self.in_windows > self.of_windows:
            problems.append(
                f"in_windows {self.in_windows} is more than of_windows {self.of_windows}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


BUILT_IN_RULES: dict[str, dict[str, Any]] = {
    "columns_drifted": {
        "metric": "drift/num_drifted_columns",
        "above": 0.0,
        "in_windows": 2,
        "of_windows": 3,
        "runbook": "Look at the columns that moved: did the inputs change, or how they are made?",
    },
    "accuracy_fell": {
        "metric": "drift/performance/accuracy_upper",
        "falls_by": 0.05,
        "in_windows": 2,
        "of_windows": 3,
        "min_rows": 30,
        "severity": "critical",
        "runbook": "Check a few labels by hand; if they are right, retrain or roll back.",
    },
    "estimated_accuracy_fell": {
        "metric": "drift/performance/estimated_accuracy_upper",
        "falls_by": 0.05,
        "in_windows": 2,
        "of_windows": 3,
        "min_rows": 50,
        "runbook": "Estimated from confidences alone: have some rows labelled before acting on it.",
    },
    "calibration_off": {
        "metric": "drift/performance/ece_lower",
        "above": 0.15,
        "in_windows": 2,
        "of_windows": 3,
        "min_rows": 30,
        "runbook": "Confidences no longer mean what they say: do not act on them; recalibrate.",
    },
}


class SinkConfig(Section):
    """What every receiver of alerts has."""

    min_severity: Severity = "warning"
    """Less serious alerts are recorded, but not sent here."""
    timeout_seconds: Positive = 10.0
    """Longest time one attempt may take."""


class WebhookConfig(SinkConfig):
    """An https address that is sent each alert as JSON, signed."""

    url: str | None = None
    """The address: https only. Give exactly one of url and url_env."""
    url_env: EnvironmentName | None = None
    """Environment variable that holds the address, where the address itself is a secret."""
    allowed_hosts: list[str] = []
    """Hosts it may have; needed with url_env, by default the host of url."""
    secret_env: EnvironmentName | None = None
    """Environment variable with the secret that signs each message (HMAC-SHA256)."""
    allowed_networks: list[str] = []
    """Private networks it may be in, such as 10.1.0.0/16; others, loopback and link-local are refused."""
    ca_file: str | None = None
    """Certificates to trust instead of the system's."""

    @field_validator("allowed_networks")
    @classmethod
    def _networks(cls, networks: list[str]) -> list[str]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks

    @property
    def hosts(self) -> list[str]:
        """The hosts it may have."""
        return self.allowed_hosts or [str(urlsplit(self.url or "").hostname)]

    @model_validator(mode="after")
    def _address(self) -> "WebhookConfig":
        problems = []
        if (self.url is None) == (self.url_env is None):
            problems.append("give exactly one of url and url_env")
        if self.url_env is not None and not self.allowed_hosts:
            problems.append("url_env needs allowed_hosts")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme != "https" or not parts.hostname:
                problems.append("url must be an https address")
            elif parts.username or parts.password or parts.query:
                problems.append("url must hold no login and no query: use url_env for secret ones")
            elif parts.hostname not in [host.lower() for host in self.hosts]:
                problems.append(f"the host {parts.hostname} of url is not among allowed_hosts")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class CommandConfig(SinkConfig):
    """A program that is started with each alert as JSON on its standard input; no shell."""

    argv: Annotated[list[str], Field(min_length=1)]
    """Program and arguments, one by one."""


class SinksConfig(Section):
    """Who is told of alerts. A failed delivery is tried again at the next runs."""

    json_lines: bool = True
    """Append each alert to monitoring/alerts.jsonl."""
    wandb: bool = True
    """Alert through Weights & Biases, unless `wandb.mode` is disabled."""
    webhooks: dict[str, WebhookConfig] = {}
    """Webhooks by a name of yours."""
    commands: dict[str, CommandConfig] = {}
    """Commands by a name of yours."""
    max_attempts: PositiveInt = 20
    """Runs that try a delivery before it is given up (and shown as such)."""


class MonitoringConfig(Section):
    """Judging production windows: drift, sequential alarms, rules, and where alerts go."""

    drift: DriftConfig = DriftConfig()
    sequential: SequentialConfig = Field(default={}, validate_default=True)
    rules: dict[str, RuleConfig] = Field(default={}, validate_default=True)
    """Rules by a name of yours, beside the built-in ones; the name of a built-in one changes it."""
    sinks: SinksConfig = SinksConfig()
    repeat_after_hours: Positive = 24.0
    """An alert about the same rule and column is recorded again, but sent only once in so many hours."""
    max_alerts_a_day: PositiveInt = 20
    """Alerts sent a day; more are recorded and held until there is room again."""
    max_rows_an_alert: PositiveInt = 20
    """Most extreme rows that an alert names and a replay computes again."""
    keep_windows: PositiveInt = 100
    """Copies of the newest windows kept for replay; those of open alerts are always kept."""

    @model_validator(mode="before")
    @classmethod
    def _with_built_in_rules(cls, data: Any) -> Any:
        return _with_built_in(data, "rules", BUILT_IN_RULES)


def _with_built_in(data: Any, key: str, built_in: dict[str, dict[str, Any]]) -> Any:
    """Those given under a key on top of the built-in ones; what is no mapping is left to pydantic."""
    given = data.get(key, {}) if isinstance(data, dict) else None
    if not isinstance(given, dict):
        return data
    merged: dict[str, Any] = {name: dict(one) for name, one in built_in.items()}
    for name, one in given.items():
        merged[name] = merged[name] | one if isinstance(one, dict) and name in merged else one
    return {**data, key: merged}
