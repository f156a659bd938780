"""`report.html`: one file that shows a run, opens offline and asks nobody for anything.

Everything that a user or a data set brought in is escaped by Jinja; only our charts are markup.
"""

import base64
from pathlib import Path
from typing import Any

import yaml

from monitoring import figures, words
from monitoring.channels import channels_of, model_name
from monitoring.classes import by_class, hardest
from monitoring.headline import tiles, verdict
from monitoring.pages import render, shown
from monitoring.production import Production, content_of, load_production
from monitoring.run import Run, is_number, load_run, mean
from monitoring.sequences import sequences
from pipeline.errors import RunFolderError
from pipeline.records import RunFolder, write_text

NUM_UNCERTAIN_SAMPLES = 20
_MAX_TEXT_CHARACTERS = 1500
_PNG, _MAX_PICTURE_BYTES = b"\x89PNG\r\n\x1a\n", 32_768
_OF_TOKENS = ("text-generation", "image-text-to-text")  # tasks whose predictions are tokens
_CALIBRATION_MEASURES = ("ece", "ece_equal_mass", "brier", "nll")
_UNCERTAINTY_ORDER = ("predictive_entropy", "mutual_information", "perplexity")


def write_report(folder: RunFolder) -> Path:
    """Render the report into the run folder.

    Raises:
        RunFolderError: there is nothing to report: no step was logged, nothing was evaluated.
    """
    if not folder.metrics.is_file() and not folder.report_json.is_file():
        raise RunFolderError(
            f"{folder.path} was to hold what a report shows, but neither {folder.metrics.name} nor "
            f"{folder.evaluation.name}/{folder.report_json.name} is there. Train the run, then "
            "evaluate it: `masklock evaluate RUN`."
        )
    write_text(folder.report_html, render_report(folder))
    return folder.report_html


def render_report(folder: RunFolder) -> str:
    """The whole page; the same text for the same run folder."""
    return render("report.html.j2", _content(load_run(folder), load_production(folder)))


def _content(run: Run, production: Production | None) -> dict[str, Any]:
    """Everything the template shows, section by section."""
    config = _parsed(run.config)
    return {
        "name": run.report.get("run") or run.name,
        "facts": _facts(run, config),
        "seed": run.report.get("seed", config.get("seed")),
        "verdict": verdict(run),
        "tiles": tiles(run),
        "quality": _quality(run),
        "production": content_of(production) if production else None,
        "classes": _classes(run),
        "curves": shown(figures.curve_charts(run)),
        "calibration": _calibration(run),
        "uncertainty": _uncertainty(run),
        "generation": sequences(run),
        "channels": channels_of(run),
        "memorisation": _memorisation(run),
        "ood": [_ood(run, name) for name in run.section("ood")],
        "samples": _most_uncertain(run),
        "plan": _plan(run),
        "system": _system(run),
        "versions": run.section("versions"),
        "config": run.config,
    }


def _parsed(text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:  # shown as it is all the same
        return {}
    return config if isinstance(config, dict) else {}


def _facts(run: Run, config: dict[str, Any]) -> list[tuple[str, str]]:
    """The line under the title."""
    model = config.get("model")
    model = model if isinstance(model, dict) else {}
    task = run.report.get("task") or model.get("task")
    sizes = run.section("num_samples")
    rows = [f"{sizes[key]:,} {key}" for key in ("train", "validation", "test") if sizes.get(key)]
    facts = {
        "Task": words.title_of(task) if task else None,
        "Model": model_name(model),
        "Rows": ", ".join(rows),
        "Evaluated": str(run.report.get("created") or "").replace("T", " ").replace("Z", " UTC"),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _quality(run: Run) -> dict[str, Any]:
    """Measures by way of predicting, each with its interval if there is one."""
    quality = {way: values for way, values in run.section("quality").items() if values}
    names = list(dict.fromkeys(name for values in quality.values() for name in values))
    intervals = run.section("intervals")
    rows = [
        {"title": words.WAYS.get(way, way), "values": values, "intervals": _of_way(intervals, way)}
        for way, values in quality.items()
    ]
    return {"names": names, "rows": rows}


def _classes(run: Run) -> dict[str, Any]:
    """The table class by class, and the picture of what is taken for what."""
    every = by_class(run.samples_of("test"))
    return {
        "rows": hardest(every),
        "num_classes": len(every),
        "charts": shown(figures.confusion_charts(run)),
    }


def _of_way(intervals: dict[str, Any], way: str) -> dict[str, Any]:
    prefix = f"{way}/"
    return {k.removeprefix(prefix): v for k, v in intervals.items() if k.startswith(prefix)}


def _calibration(run: Run) -> dict[str, Any]:
    calibration = run.section("calibration")
    rows = [(words.WAYS[way], calibration[way]) for way in words.WAYS if calibration.get(way)]
    best = {
        name: min((v[name] for _, v in rows if is_number(v.get(name))), default=None)
        for name in _CALIBRATION_MEASURES
    }
    return {
        "rows": rows,
        "names": [name for name in _CALIBRATION_MEASURES if best[name] is not None],
        "best": best,
        "temperature": calibration.get("temperature"),
        "unit": "tokens" if run.report.get("task") in _OF_TOKENS else "rows",
        "charts": shown(figures.reliability_charts(run)),
    }


def _uncertainty(run: Run) -> dict[str, Any]:
    uncertainty = run.section("uncertainty")
    means, aurocs = uncertainty.get("means") or {}, uncertainty.get("error_auroc") or {}
    names = [
        name
        for name in dict.fromkeys([*aurocs, *means])
        if is_number(means.get(name)) or is_number(aurocs.get(name))
    ]
    rows = [{"name": name, "mean": means.get(name), "auroc": aurocs.get(name)} for name in names]
    charts = shown(figures.uncertainty_charts(run))
    return {
        "rows": rows,
        "has_auroc": any(is_number(row["auroc"]) for row in rows),
        "charts": charts,
    }


def _memorisation(run: Run) -> dict[str, Any]:
    """How often rows are repeated verbatim, a row for each kind of prompt."""
    section = run.section("memorisation")
    titles = {"train": "Training rows", "control": "Test rows", "canaries": "Canaries"}
    rows = [{"title": title, **section[key]} for key, title in titles.items() if section.get(key)]
    return {**section, "rows": rows}


def _ood(run: Run, name: str) -> dict[str, Any]:
    entry = run.report["ood"][name] or {}
    scores = entry.get("scores") or {}
    ranked = sorted(scores, key=lambda score: -_or_zero((scores[score] or {}).get("auroc")))
    return {
        "name": name,
        "num_rows": (run.section("num_samples").get("ood") or {}).get(name),
        "verdict": entry.get("verdict"),
        "best": entry.get("best"),
        "comparison": _comparison(entry, scores),
        "rows": [(score, scores[score] or {}) for score in ranked],
        "charts": shown(figures.ood_charts(run, name)),
    }


def _comparison(entry: dict[str, Any], scores: dict[str, Any]) -> str:
    """Monte-Carlo against the plain pass, in words."""
    plain, mc = entry.get("best_deterministic", ""), entry.get("best_mc", "")
    plain_auroc, mc_auroc = ((scores.get(score) or {}).get("auroc") for score in (plain, mc))
    if not (is_number(plain_auroc) and is_number(mc_auroc)):
        return ""
    verb = "beats" if entry.get("mc_beats_deterministic") else "does not beat"
    return (
        f"Monte-Carlo dropout {verb} the plain pass here: its best score, {words.title_of(mc)}, "
        f"has AUROC {words.decimal(mc_auroc)}; the best of one plain pass, "
        f"{words.title_of(plain)}, {words.decimal(plain_auroc)}."
    )


def _most_uncertain(run: Run) -> dict[str, Any]:
    rows = run.samples_of("test")
    order = next(
        (name for name in _UNCERTAINTY_ORDER if any(is_number(row.get(name)) for row in rows)), None
    )
    if order is None:
        return {"rows": []}
    rows = sorted(rows, key=lambda row: (-_or_zero(row.get(order)), row.get("sample_id") or 0))
    rows = [
        row | {"text": _cut(row.get("text")), "picture": _picture(row.get("thumbnail"))}
        for row in rows[:NUM_UNCERTAIN_SAMPLES]
    ]
    columns = ("confidence", "predictive_entropy", "mutual_information", "perplexity")
    known = [name for name in columns if any(is_number(row.get(name)) for row in rows)]
    has_labels = any(row.get("prediction") is not None for row in rows)
    return {
        "rows": rows,
        "order": order,
        "columns": known,
        "has_labels": has_labels,
        "has_pictures": any(row["picture"] for row in rows),
        "has_text": any(row["text"] for row in rows),
    }


def _picture(png: Any) -> str:
    """A small image as a `data:` URI: the page stays one file."""
    if not isinstance(png, bytes) or not png.startswith(_PNG) or len(png) > _MAX_PICTURE_BYTES:
        return ""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _cut(value: Any) -> str:
    text = "" if value is None else str(value)
    if len(text) <= _MAX_TEXT_CHARACTERS:
        return text
    return f"{text[:_MAX_TEXT_CHARACTERS]} … ({len(text):,} characters)"


def _plan(run: Run) -> dict[str, Any]:
    sites = run.plan.get("sites") or []
    groups: dict[tuple[Any, ...], int] = {}
    for site in sites:
        if site.get("in_force"):
            key = tuple(site.get(name) for name in ("role", "variant", "rate", "door"))
            key += (changes_of(site),)
            groups[key] = groups.get(key, 0) + 1
    return {
        "sites": sites,
        "groups": sorted(groups.items(), key=str),
        "num_in_force": sum(groups.values()),
        "digest": run.plan.get("digest"),
        "notes": run.plan.get("notes") or [],
    }


def changes_of(site: dict[str, Any]) -> str:
    """How a site's rate changes: by step, by data domain, or by learning."""
    if site.get("learned"):
        return "learned"
    progress = site.get("progress", "constant")
    domains = [f"{name} {rate:g}" for name, rate in (site.get("domains") or {}).items()]
    channels = [f"{name} {rate:g}" for name, rate in (site.get("channels") or {}).items()]
    return ", ".join([progress] * (progress != "constant") + domains + channels)


def _system(run: Run) -> dict[str, Any]:
    training = [row for row in run.metrics if any(key.startswith("train/") for key in row)]
    times = [row["time"] for row in training if is_number(row.get("time"))]
    rows = [(key, [value for _, value in run.history(key)]) for key in run.metric_keys("system/")]
    return {
        "rows": [
            {"name": key.split("/", 1)[1], "mean": mean(v), "low": min(v), "high": max(v)}
            for key, v in rows
            if v
        ],
        "training_seconds": max(times) - min(times) if len(times) > 1 else None,
        "mc": run.section("mc"),
    }


def _or_zero(value: Any) -> float:
    return value if is_number(value) else 0.0
