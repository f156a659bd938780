"""The evaluation stage: a trained run -> evaluation/report.json and evaluation/samples.parquet.

Several processes (torchrun, `accelerate launch`) share out the batches; the main one judges and
writes, and the files are those of one process.
"""

import io
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from pipeline import agreement, engines, parallel
from pipeline.config.load import config_diff, load_config
from pipeline.config.schema import RunConfig
from pipeline.data import PreparedData, load_raw, prepare_data
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.kernels import active_kernel
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import ConfigError, DataError, RunFolderError
from pipeline.evaluation import judge
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.evaluation.ood.registry import FeatureDetector, fit_detectors
from pipeline.evaluation.predict import Clock, Predictor
from pipeline.evaluation.samples import joined, samples_table
from pipeline.evaluation.verdict import verdict
from pipeline.exhibits import Exhibit, Table
from pipeline.modality.bundle import MODALITIES, chosen
from pipeline.records import RunFolder, read_jsonl, write_bytes, write_json
from pipeline.tracking import open_tracker
from pipeline.trained import require_same_labels, trained_model, trained_tokenizer

Say = Callable[[str], None]
Exhibits = Callable[[RunFolder], Mapping[str, Exhibit]]

def evaluate(
    run: RunFolder,
    config: RunConfig,
    say: Say = lambda sentence: None,
    exhibits: Exhibits = lambda run: {},
) -> dict[str, Any]:
    """Evaluate a trained run.

    Args:
        run: its folder; it must hold `model/` and `plan.json`.
        config: its configuration; `evaluation:` and `data:` may differ from the training's.
        say: receives the few sentences a user should read.
        exhibits: what trackers show of the evaluated run, by name, once its files are written.

    Returns:
        The report, as written to `evaluation/report.json`; the same on every process.
    """
    launch = parallel.read_launch()
    devices = parallel.visible_devices(config.train.use_cpu)
    parallel.require_devices(parallel.local_world_size(), devices)
    with parallel.exchanging(launch):
        is_main = parallel.is_main()
        return _evaluate(run, config, say if is_main else _keep_quiet, exhibits)


def _evaluate(
    run: RunFolder, config: RunConfig, say: Say, figures: Figures, keep: Keep
) -> dict[str, Any]:
    plan = read_plan(run, config)
    agreement.agree(agreement.start_facts(config))
    raw, data, predictor, tokenizer = _load(run, config, plan)
    fit_rows = _rows_to_fit(data, config)
    _agree_on_masks(predictor, data)
    predictions = _predict(predictor, data, say)
    to_fit, clock = predictor.features(fit_rows), predictor.slowest_clock()
    report = None
    if parallel.is_main():
        detectors = _fit(to_fit, predictor.has_classes, config)
        batches = {split: predictor.batches_of(rows) for split, rows in _rows(data).items()}
        scores = {
            split: judge.scores_of(part, detectors, batches[split])
            for split, part in predictions.items()
        }
        report = _report(config, data, predictor, clock, predictions, scores)
        temperature = report["calibration"].get("temperature")
        fitted = Fitted(model_version(run), detectors, temperature)
        origin = Origin(data.label_names, temperature, unknown_token(tokenizer))
        scored = {
            split: scored_table(predictions[split], rows, batches[split], scores[split], origin)
            for split, rows in _reported(data).items()
        }
        _write(run, report, scored, fitted)
        keep(run, _reference(scored["test"], raw, data, config, plan, fitted))
        say(_track(run, config, report, figures(run)))
    return dict(parallel.from_main(report))


def _keep_quiet(sentence: str) -> None:
    """The main process speaks for all."""


def _agree_on_masks(predictor: Predictor, data: PreparedData) -> None:
    keyed, device = predictor.monte_carlo.keyed, predictor.device
    agreement.agree(agreement.run_facts(keyed.plan, keyed.seed, data.fingerprint, 0, device))


# -- what there is to evaluate -------------------------------------------------------------------


def _load(
    run: RunFolder, config: RunConfig, plan: DropoutPlan
) -> tuple[RawData, PreparedData, Predictor, Any]:
    tokenizer = trained_tokenizer(run, config)
    with parallel.main_first():
        raw = load_raw(config)
        data = prepare_data(config, raw, tokenizer)
    require_same_labels(run, data)
    return raw, data, open_predictor(run, config, plan, tokenizer), tokenizer


def _rows_to_fit(data: PreparedData, config: RunConfig) -> Any:
    """The training rows behind the feature detectors, chosen by key."""
    limit, wanted = config.evaluation.max_fit_samples, config.evaluation.knn_neighbours
    keep = chosen(len(data.train), limit)
    rows = data.train if keep is None else data.train.select(keep)
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


def versions() -> dict[str, str]:
    """What this run was computed with."""
    packages = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "scikit-learn")
    found = {name: version(name) for name in packages}
    return (
        {"masklock": version("masklock"), "python": platform.python_version()}
        | found
        | {"mask kernel": active_kernel()}
    )


def _samples(
    data: PreparedData,
    predictions: Mapping[str, judge.Prediction],
    scores: Mapping[str, judge.Scores],
) -> pa.Table:
    return joined(
        [
            samples_table(split, predictions[split], rows, scores[split], data.label_names)
            for split, rows in _reported(data).items()
        ]
    )


# -- writing -------------------------------------------------------------------------------------


def _write(run: RunFolder, report: dict[str, Any], table: pa.Table) -> None:
    run.evaluation.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(run.samples, buffer.getvalue())
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
    for set_name, section in report["ood"].items():
        for score, figures in section["scores"].items():
            numbers[f"ood/{set_name}/{score}_auroc"] = figures["auroc"]
    return numbers
