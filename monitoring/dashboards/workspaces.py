"""The two W&B workspaces, built from code: what people look at every day.

The reviewed JSON files beside this one are what `specifications` gives for a whole project. A test
holds them equal, and that every metric of a panel is one that is logged.
"""

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.reports.v2.interface import PanelTypes

from pipeline.metric_names import STEP, WINDOW
from pipeline.records import write_json

TITLES = {
    "dropout_and_uncertainty": "Dropout and uncertainty",
    "production_drift": "Production drift",
}
REVIEWED = {name: Path(__file__).with_name(f"{name}.json") for name in TITLES}

_WAYS = ("deterministic", "mc", "mc_temperature")


def specifications(run_name: str | None = None) -> dict[str, dict[str, Any]]:
    """Both workspaces as W&B stores them, by name; of one run where it is named, else of all."""
    sections = {
        "dropout_and_uncertainty": (STEP, _dropout_and_uncertainty()),
        "production_drift": (WINDOW, _production_drift()),
    }
    return {name: _specification(name, *parts, run_name) for name, parts in sections.items()}


def write_reviewed() -> None:
    """Write the reviewed files anew, after a change here."""
    for name, specification in specifications().items():
        write_json(REVIEWED[name], specification)


def view_name(name: str, run_id: str) -> str:
    """The same name each time, so that saving again changes the view and adds none."""
    digest = blake2b(f"{name} {run_id}".encode(), digest_size=8).hexdigest()
    return f"nw-{digest[:11]}-v"


# -- the panels ----------------------------------------------------------------------------------


def _dropout_and_uncertainty() -> list[ws.Section]:
    return [
        _section(
            "Training",
            _lines("Loss", STEP, "train/loss", "eval/loss"),
            _lines("Quality while training", STEP, pattern="eval/(accuracy|f1|perplexity|ece)"),
            _lines("Learning rate", STEP, "train/learning_rate"),
            _lines("Gradient norm", STEP, "train/grad_norm", log_y=True),
            _lines("Learned dropout rates", STEP, pattern="dropout/.*"),
        ),
        _section(
            "Uncertainty of the test rows",
            _curves("Predictive entropy", "uncertainty/predictive_entropy_histogram", "nats"),
            _curves("Mutual information", "uncertainty/mutual_information_histogram", "nats"),
            _curves("Confidence", "uncertainty/confidence_histogram", "probability"),
            _bars(
                "Mean over the rows",
                "uncertainty/predictive_entropy",
                "uncertainty/expected_entropy",
                "uncertainty/mutual_information",
            ),
            _lines("Quality", STEP, pattern="eval/(deterministic|mc)_(accuracy|f1|perplexity)"),
            _table("uncertainty/most_uncertain"),
        ),
        _section(
            "Calibration",
            _curves("Accuracy by confidence", "calibration/reliability", "confidence"),
            _bars("Expected calibration error", *_each_way("ece")),
            _bars("Negative log-likelihood", *_each_way("nll")),
            _bars("Brier score", *_each_way("brier")),
            _bars("Temperature", "calibration/temperature"),
        ),
        _section(
            "Out of distribution",
            _curves("The best score", "ood/best_score_histogram", "score"),
            _lines("AUROC of each set and score", STEP, pattern="ood/.*_auroc"),
        ),
        _section(
            "Machine",
            _lines("Samples a second", STEP, "system/samples_per_second"),
            _lines("Tokens a second", STEP, "system/tokens_per_second"),
            _lines("Memory (MB)", STEP, "system/memory_mb"),
        ),
    ]


def _production_drift() -> list[ws.Section]:
    return [
        _section(
            "Windows and alerts",
            _lines("Columns that drifted", WINDOW, "drift/num_drifted_columns"),
            _lines("Alerts", WINDOW, "monitor/num_alerts"),
            _lines("Rows", WINDOW, "drift/num_rows"),
            _table("monitor/alerts"),
        ),
        _section(
            "Drift",
            _lines("Effect size by column", WINDOW, pattern="drift/.*/effect"),
            _lines(
                "Adjusted p-value by column",
                WINDOW,
                pattern="drift/.*/adjusted_p_value",
                log_y=True,
            ),
            _lines("Effect on the embeddings", WINDOW, "drift/embedding/effect"),
            _curves("Confidence", "drift/confidence_histogram", "probability"),
            _curves("Predictive entropy", "drift/predictive_entropy_histogram", "nats"),
            _curves("Mutual information", "drift/mutual_information_histogram", "nats"),
        ),
        _section(
            "Uncertainty and unfamiliar inputs",
            _lines(
                "Mean uncertainty",
                WINDOW,
                "uncertainty/predictive_entropy",
                "uncertainty/expected_entropy",
                "uncertainty/mutual_information",
            ),
            _lines("Disagreement of the passes", WINDOW, "uncertainty/disagreement"),
            _lines("Mean out-of-distribution scores", WINDOW, pattern="ood/.*_mean"),
            _lines("Sequential detectors", WINDOW, pattern="drift/sequential/.*", log_y=True),
        ),
        _section(
            "Quality",
            _lines(
                "Accuracy, with labels and without",
                WINDOW,
                "drift/performance/accuracy",
                "drift/performance/estimated_accuracy",
            ),
            _lines("Calibration error", WINDOW, "drift/performance/ece"),
            _lines("Negative log-likelihood", WINDOW, "drift/performance/nll"),
        ),
        _section(
            "Inputs",
            _lines("Mean length in tokens", WINDOW, "drift/num_tokens/mean"),
            _lines("Share of unknown tokens", WINDOW, "drift/unknown_token_share/mean"),
        ),
    ]


# -- how a panel is written ----------------------------------------------------------------------


def _section(name: str, *panels: PanelTypes) -> ws.Section:
    return ws.Section(name=name, panels=list(panels), is_open=True)


def _lines(
    title: str, x: str, *keys: str, pattern: str | None = None, log_y: bool | None = None
) -> PanelTypes:
    """Lines of these keys, or of all that match the pattern."""
    return wr.LinePlot(title=title, x=x, y=list(keys), metric_regex=pattern, log_y=log_y)


def _bars(title: str, *keys: str) -> PanelTypes:
    return wr.BarPlot(title=title, metrics=list(keys))


def _curves(title: str, key: str, x: str) -> PanelTypes:
    """A binned curve (`pipeline.exhibits.Curve`), whose points are in a table of its own."""
    return wr.CustomChart(
        query={"summaryTable": {"tableKey": f"{key}_table"}},
        chart_name="wandb/lineseries/v0",
        chart_fields={name: name for name in ("step", "lineKey", "lineVal")},
        chart_strings={"title": title, "xname": x},
    )


def _table(key: str) -> PanelTypes:
    return wr.WeavePanelSummaryTable(table_name=key)


def _each_way(measure: str) -> Iterable[str]:
    return (f"calibration/{way}_{measure}" for way in _WAYS)


def _specification(
    name: str, x: str, sections: list[ws.Section], run_name: str | None
) -> dict[str, Any]:
    """As JSON, with panels numbered: the library draws their ids at random."""
    for number, section in enumerate(sections):
        for place, panel in enumerate(section.panels):
            panel._id = f"{name.replace('_', '-')}-{number}-{place}"  # type: ignore[union-attr]
    workspace = ws.Workspace(
        name=TITLES[name],
        entity="",
        project="",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=x),
        runset_settings=ws.RunsetSettings(filters=f"Group = '{run_name}'" if run_name else ""),
        auto_generate_panels=False,
    )
    text = workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    specification: dict[str, Any] = json.loads(text)
    return specification
