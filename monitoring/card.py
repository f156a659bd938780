"""The model card: what was measured, for those who find the model on a hub.

Mitchell et al., "Model Cards for Model Reporting", FAT* 2019; the format is Hugging Face's: a
README.md beside the weights, whose front matter search pages read.
"""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from monitoring import words
from monitoring.pages import render
from monitoring.profile import ReferenceProfile, read_profile
from monitoring.run import Run, is_number, load_run
from pipeline.errors import RunFolderError
from pipeline.records import RunFolder, write_text

USUAL = 0.05  # what is outside the 5 % and 95 % quantiles of the reference is unusual
_METRICS = {"accuracy": "accuracy", "f1": "f1", "perplexity": "perplexity", "loss": "loss"}


def write_card(folder: RunFolder) -> Path:
    """Write model/README.md.

    Raises:
        RunFolderError: the run was not evaluated, so that there is nothing to say of the model.
    """
    if not folder.report_json.is_file() or not folder.model.is_dir():
        raise RunFolderError(
            f"A card says what was measured of a model, but {folder.path} was not evaluated yet. "
            "Evaluate it first: `masklock evaluate RUN`."
        )
    profile = read_profile(folder) if folder.profile.is_dir() else None
    path = folder.model / "README.md"
    write_text(path, render_card(load_run(folder), profile))
    return path


def render_card(run: Run, profile: ReferenceProfile | None) -> str:
    """The whole card; the same text for the same run folder."""
    config = yaml.safe_load(run.config) if run.config else {}
    content = {
        "name": run.report.get("run") or run.name,
        "report": run.report,
        "data": config.get("data") or {},
        "base": _origin(config),
        "quality": _quality(run),
        "calibration": _calibration(run),
        "measures": list(next(iter(run.section("quality").values()), None) or {}),
        "ood": [_ood(name, entry or {}) for name, entry in run.section("ood").items()],
        "roles": _roles(run),
        "usual": [] if profile is None else _usual(profile),
        "profile": profile,
        "usual_percent": round(100 * (1 - 2 * USUAL)),
    }
    return f"---\n{_front_matter(run, config)}\n---\n{render('card.md.j2', content)}"


def _front_matter(run: Run, config: dict[str, Any]) -> str:
    """What the hub indexes, by the hub's own classes."""
    from huggingface_hub import EvalResult, ModelCardData

    data, name = config.get("data") or {}, str(run.report.get("run") or run.name)
    task = run.report.get("task")
    results = [
        EvalResult(
            task_type=str(task),
            dataset_type=str(data.get("name") or data.get("path")),
            dataset_name=str(data.get("name") or data.get("path")),
            dataset_split=data.get("test_split"),
            metric_type=_METRICS[metric],
            metric_name=words.title_of(metric),
            metric_value=round(value, 4),
        )
        for metric, value in (run.section("quality").get("mc") or {}).items()
        if metric in _METRICS and is_number(value)
    ]
    card = ModelCardData(
        model_name=name,
        base_model=_base(config),
        library_name="peft" if config.get("peft") else "transformers",
        pipeline_tag=task,
        tags=["masklock", "mc-dropout", "uncertainty"],
        metrics=[result.metric_type for result in results] or None,
        eval_results=results or None,
    )
    return card.to_yaml().strip()


def _base(config: dict[str, Any]) -> str | None:
    """The model it was fine-tuned from, where that is a name on the hub."""
    name = _origin(config)
    return name if name and ":" not in name else None


def _origin(config: dict[str, Any]) -> str | None:
    """The same, or an installed package; a folder of some machine says nothing to others."""
    name = (config.get("model") or {}).get("model_name_or_path")
    return None if not name or name.startswith(("/", ".", "~")) else str(name)


def _quality(run: Run) -> list[dict[str, Any]]:
    """A row a way of predicting, each measure with its interval."""
    intervals = run.section("intervals")
    return [
        {
            "title": words.WAYS.get(way, way),
            "values": {
                name: (value, words.interval(intervals.get(f"{way}/{name}"), name))
                for name, value in (values or {}).items()
            },
        }
        for way, values in run.section("quality").items()
    ]


def _calibration(run: Run) -> list[tuple[str, dict[str, Any]]]:
    section = run.section("calibration")
    return [(title, section[way]) for way, title in words.WAYS.items() if section.get(way)]


def _ood(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The best score, with and without Monte-Carlo passes, on one set."""
    scores = entry.get("scores") or {}
    keys = ("best_deterministic", "best_mc")
    best = [entry[key] for key in keys if scores.get(entry.get(key))]
    return {"name": name, "rows": [(score, scores[score]) for score in best]}


def _roles(run: Run) -> list[tuple[str, int, list[float]]]:
    """Role, number of sites in force, their rates."""
    sites = [site for site in run.plan.get("sites") or [] if site.get("in_force")]
    roles = dict.fromkeys(site["role"] for site in sites)
    return [
        (role, len(own := [site for site in sites if site["role"] == role]), _rates(own))
        for role in roles
    ]


def _rates(sites: list[dict[str, Any]]) -> list[float]:
    return sorted({site["rate"] for site in sites})


def _usual(profile: ReferenceProfile) -> list[tuple[str, float, float, float]]:
    """Column, mean, and where all but the outer rows of the reference lie."""
    rows = []
    for name, summary in profile.numbers.items():
        values = profile.sample_numbers(name)
        values = values[np.isfinite(values)]
        if len(values):
            low, high = np.quantile(values, [USUAL, 1 - USUAL])
            rows.append((name, summary.mean, float(low), float(high)))
    return rows
