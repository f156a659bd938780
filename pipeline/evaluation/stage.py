"""The evaluation stage: a trained run -> evaluation/report.json and evaluation/samples.parquet.

Several processes (torchrun, `accelerate launch`) share out the batches; the main one judges and
writes, and the files are those of one process.
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pyarrow as pa
from torch import Tensor

from pipeline import agreement, parallel
from pipeline.canaries import without_canaries
from pipeline.config.schema import RunConfig
from pipeline.data import PreparedData, RawData, load_raw, prepare_data
from pipeline.dropout.kernels import active_kernel
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import DataError
from pipeline.evaluation import judge
from pipeline.evaluation.channels import channels_of_test, logits_without
from pipeline.evaluation.fitted import Fitted, write_fitted
from pipeline.evaluation.generation import Generator
from pipeline.evaluation.inputs import carried_columns
from pipeline.evaluation.memorisation import memorisation_section
from pipeline.evaluation.ood.registry import FeatureDetector, fit_detectors
from pipeline.evaluation.opening import open_predictor, processes, read_plan
from pipeline.evaluation.predict import Clock, Predictor
from pipeline.evaluation.samples import (
    Origin,
    described_by,
    samples_of,
    scored_table,
    scoring_facts,
    with_carried,
    with_metadata,
    with_sequences,
    write_table,
)
from pipeline.evaluation.sequences import Row, SequenceJudge, sequence_section
from pipeline.evaluation.verdict import verdict
from pipeline.exhibits import Exhibit, Table
from pipeline.modality.bundle import kept_rows, modality_of
from pipeline.records import RunFolder, read_jsonl, write_json
from pipeline.tracking import open_tracker
from pipeline.trained import model_version, require_same_labels, trained_processor

Say = Callable[[str], None]
Exhibits = Callable[[RunFolder], Mapping[str, Exhibit]]
KeepProfile = Callable[[RunFolder, pa.Table], None]


def evaluate(
    run: RunFolder,
    config: RunConfig,
    say: Say = lambda sentence: None,
    exhibits: Exhibits = lambda run: {},
    keep_profile: KeepProfile = lambda run, scored: None,
) -> dict[str, Any]:
    """Evaluate a trained run.

    Args:
        run: its folder; it must hold `model/` and `plan.json`.
        config: its configuration; `evaluation:` and `data:` may differ from the training's.
        say: receives the few sentences a user should read.
        exhibits: what trackers show of the evaluated run, by name, once its files are written.
        keep_profile: is given the scored rows of the test split, the reference of production.

    Returns:
        The report, as written to `evaluation/report.json`; the same on every process.
    """
    with processes(config):
        speak = say if parallel.is_main() else _keep_quiet
        return _evaluate(run, config, speak, exhibits, keep_profile)


def _evaluate(
    run: RunFolder, config: RunConfig, say: Say, exhibits: Exhibits, keep_profile: KeepProfile
) -> dict[str, Any]:
    plan = read_plan(run, config)
    agreement.agree(agreement.start_facts(config))
    opened = _open(run, config, plan)
    fit_rows = _rows_to_fit(opened.data, config)
    _agree_on_masks(opened.predictor, opened.data)
    predictions = _predict(opened.predictor, opened.data, say)
    to_fit, clock = opened.predictor.features(fit_rows), opened.predictor.slowest_clock()
    said = _sequences(opened, config, say)
    channels = modality_of(config).channels
    without = logits_without(opened.predictor, opened.data.test, channels)
    report = None
    if parallel.is_main():
        detectors = _fit(to_fit, opened.predictor.has_classes, config)
        scores = _scores(opened, predictions, detectors)
        report = _report(config, opened.data, opened.predictor, clock, predictions, scores)
        report |= _memorisation(opened, config, say)
        report |= channels_of_test(predictions["test"], without, config)
        if config.evaluation.generation is not None:
            report["generation"] = sequence_section(said, config.evaluation.generation)
        fitted = Fitted(model_version(run), detectors, report["calibration"].get("temperature"))
        scored = _scored(config, opened, predictions, scores, fitted)
        _write(run, report, scored, fitted, said)
        keep_profile(run, _reference(scored["test"], opened, config, plan, fitted))
        say(_track(run, config, report, exhibits(run)))
    return dict(parallel.from_main(report))


def _keep_quiet(sentence: str) -> None:
    """The main process speaks for all."""


def _agree_on_masks(predictor: Predictor, data: PreparedData) -> None:
    keyed, device = predictor.monte_carlo.keyed, predictor.device
    agreement.agree(agreement.run_facts(keyed.plan, keyed.seed, data.fingerprint, 0, device))


# -- what there is to evaluate -------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    raw: RawData
    data: PreparedData
    processor: Any
    predictor: Predictor


def _open(run: RunFolder, config: RunConfig, plan: DropoutPlan) -> _Opened:
    processor = trained_processor(run, config)
    with parallel.main_first():
        raw = load_raw(config)
        data = prepare_data(config, raw, processor)
    require_same_labels(run, data)
    return _Opened(raw, data, processor, open_predictor(run, config, plan, processor))


def _rows_to_fit(data: PreparedData, config: RunConfig) -> Any:
    """The training rows behind the feature detectors, chosen by key."""
    limit, wanted = config.evaluation.max_fit_samples, config.evaluation.knn_neighbours
    rows, _ = kept_rows(without_canaries(data.train), limit)
    if len(rows) < wanted:
        raise DataError(
            f"evaluation.knn_neighbours asks for neighbour {wanted}, but there are {len(rows)} "
            f"training rows to look among (evaluation.max_fit_samples is {limit}). Set "
            f"evaluation.knn_neighbours to at most {len(rows)}, or use more rows."
        )
    return rows


# -- predicting ----------------------------------------------------------------------------------


def _predict(predictor: Predictor, data: PreparedData, say: Say) -> dict[str, judge.Prediction]:
    rows = {"validation": data.validation, **_reported(data)}
    predictions = {}
    for split, part in rows.items():
        say(f"Predicting {len(part)} rows: {split}.")
        predictions[split] = predictor.predict(part)
    return predictions


def _reported(data: PreparedData) -> dict[str, Any]:
    """The splits that samples.parquet holds, by the names it has for them."""
    return {"test": data.test} | {f"ood:{name}": rows for name, rows in data.ood.items()}


def _fit(
    fitted_on: tuple[Tensor, Tensor], has_classes: bool, config: RunConfig
) -> dict[str, FeatureDetector]:
    features, labels = fitted_on
    return fit_detectors(
        features,
        labels if has_classes else None,
        num_neighbours=config.evaluation.knn_neighbours,
    )


def _scores(
    opened: _Opened,
    predictions: Mapping[str, judge.Prediction],
    detectors: Mapping[str, FeatureDetector],
) -> dict[str, judge.Scores]:
    return {
        split: judge.scores_of(predictions[split], detectors, opened.predictor.batches_of(rows))
        for split, rows in _reported(opened.data).items()
    }


# -- the report ----------------------------------------------------------------------------------


def _report(
    config: RunConfig,
    data: PreparedData,
    predictor: Predictor,
    clock: Clock,
    predictions: Mapping[str, judge.Prediction],
    scores: Mapping[str, judge.Scores],
) -> dict[str, Any]:
    outside = {name: scores[f"ood:{name}"] for name in data.ood}
    report = {
        "schema": "masklock-report-v1",
        "run": config.name,
        "task": config.model.task,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "versions": versions(),
        "num_samples": {
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "ood": {name: len(rows) for name, rows in data.ood.items()},
        },
        "mc": {
            "num_passes": predictor.monte_carlo.num_passes,
            "head_only": predictor.monte_carlo.body is not None,
            "num_sites": len(predictor.monte_carlo.keyed.plan.in_passes()),
            "seconds": clock.seconds,
            "deterministic_seconds": clock.deterministic_seconds,
        },
        **judge.judge(predictions["test"], predictions["validation"], config),
        "ood": judge.ood_section(scores["test"], outside, config.evaluation, config.seed),
    }
    return {**report, "verdict": verdict(report, config.evaluation.confidence_level)}


def _memorisation(opened: _Opened, config: RunConfig, say: Say) -> dict[str, Any]:
    if config.evaluation.memorisation is None:
        return {}
    say("Probing whether training rows are repeated.")
    data, model = opened.data, opened.predictor.model
    found = memorisation_section(model, data.train, data.test, config, opened.processor)
    return {"memorisation": found}


def _sequences(opened: _Opened, config: RunConfig, say: Say) -> list[Row]:
    """What the model says to test prompts, on the main process; every process takes its share."""
    if config.evaluation.generation is None:
        return []
    say("Generating from test prompts.")
    predictor, processor = opened.predictor, opened.processor
    keyed = predictor.monte_carlo.keyed
    generator = Generator(predictor.model, keyed, processor, config.seed)
    return SequenceJudge(generator, config, processor).rows(opened.data.test)


def versions() -> dict[str, str]:
    """What this run was computed with."""
    packages = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "scikit-learn")
    found = {name: version(name) for name in packages}
    return (
        {"masklock": version("masklock"), "python": platform.python_version()}
        | found
        | {"mask kernel": active_kernel()}
    )


# -- scored rows ---------------------------------------------------------------------------------


def _scored(
    config: RunConfig,
    opened: _Opened,
    predictions: Mapping[str, judge.Prediction],
    scores: Mapping[str, judge.Scores],
    fitted: Fitted,
) -> dict[str, pa.Table]:
    """Scored rows of every split that is reported."""
    described = described_by(config, opened.processor)
    origin = Origin(opened.data.label_names, fitted.temperature, described)
    return {
        split: scored_table(
            predictions[split], rows, opened.predictor.batches_of(rows), scores[split], origin
        )
        for split, rows in _reported(opened.data).items()
    }


def _reference(
    scored: pa.Table, opened: _Opened, config: RunConfig, plan: DropoutPlan, fitted: Fitted
) -> pa.Table:
    """The test rows as `masklock score` would have scored them, with the user's own columns."""
    places = opened.data.test["sample_id"][:]
    carried = carried_columns(opened.raw.test, config, places=places, taken=scored.column_names)
    names = [] if carried is None else carried.column_names
    facts = scoring_facts(config, fitted.model_version, plan.digest, opened.data.label_names, names)
    return with_metadata(with_carried(scored, carried), facts)


# -- writing -------------------------------------------------------------------------------------


def _write(
    run: RunFolder,
    report: dict[str, Any],
    scored: Mapping[str, pa.Table],
    fitted: Fitted,
    said: list[Row],
) -> None:
    samples = {split: samples_of(split, table) for split, table in scored.items()}
    samples["test"] = with_sequences(samples["test"], said)
    write_table(run.samples, pa.concat_tables(samples.values(), promote_options="default"))
    write_fitted(run, fitted)
    write_json(run.report_json, report)


def _track(
    run: RunFolder, config: RunConfig, report: Mapping[str, Any], shown: Mapping[str, Exhibit]
) -> str:
    """Headline numbers and exhibits, at the last step of the training; profile and report."""
    steps = [row["step"] for row in read_jsonl(run.metrics)] if run.metrics.is_file() else []
    numbers = headline_numbers(report)
    tracker = open_tracker(config, run, is_main=True)
    tracker.start(config.model_dump(mode="json"), config.name)
    tracker.log(numbers, max(steps, default=0))
    share_rows = config.wandb.share_rows
    for name, exhibit in shown.items():
        if share_rows or not isinstance(exhibit, Table):
            tracker.show(name, exhibit)
    for kind, path in {"profile": run.profile, "report": run.report_html}.items():
        if share_rows and path.exists():
            tracker.artifact(kind, path)
    tracker.summary(numbers)
    return tracker.finish()


def headline_numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """One flat number a measure, in the namespaces calibration/, uncertainty/ and ood/."""
    numbers: dict[str, float] = {}
    for name, quality in report["quality"].items():
        numbers |= {f"eval/{name}_{metric}": value for metric, value in quality.items()}
    for name, section in report["calibration"].items():
        if isinstance(section, dict):
            numbers |= {
                f"calibration/{name}_{metric}": section[metric]
                for metric in ("ece", "ece_equal_mass", "brier", "nll")
            }
        else:
            numbers[f"calibration/{name}"] = section
    for name, value in report["uncertainty"]["means"].items():
        numbers[f"uncertainty/{name}"] = value
    for name, part in report.get("channels", {}).get("without", {}).items():
        numbers[f"eval/without_{name}_accuracy"] = part["accuracy"]
    for name in ("train", "control", "canaries"):
        if name in report.get("memorisation", {}):
            numbers[f"eval/memorised_{name}"] = report["memorisation"][name]["share"]
    means = report.get("generation", {}).get("means", {})
    numbers |= {f"eval/sequences_{name}": value for name, value in means.items()}
    for set_name, section in report["ood"].items():
        for score, figures in section["scores"].items():
            numbers[f"ood/{set_name}/{score}_auroc"] = figures["auroc"]
    return numbers
