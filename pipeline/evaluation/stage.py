"""The evaluation stage: a trained run -> evaluation/report.json and evaluation/samples.parquet."""

import io
import json
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data import PreparedData, load_raw, prepare_data
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.kernels import active_kernel
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import RunFolderError
from pipeline.evaluation import judge
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.evaluation.ood.registry import fit_detectors
from pipeline.evaluation.predict import ClassPrediction, Predictor, TokenPrediction
from pipeline.modality.bundle import MODALITIES, chosen
from pipeline.model import load_trained
from pipeline.records import RunFolder, read_jsonl, write_bytes, write_json
from pipeline.tokenizer import load_tokenizer
from pipeline.tracking import open_tracker

EXCERPT = 500  # characters of text kept in samples.parquet
Say = Callable[[str], None]


def evaluate(run: RunFolder, config: RunConfig, say: Say = lambda sentence: None) -> dict[str, Any]:
    """Evaluate a trained run.

    Args:
        run: its folder; it must hold `model/` and `plan.json`.
        config: its configuration; `evaluation:` may differ from the training's.
        say: receives the few sentences a user should read.

    Returns:
        The report, as written to `evaluation/report.json`.
    """
    plan = _read_plan(run)
    data, predictor = _load(run, config, plan)
    say("Predicting validation rows.")
    validation = predictor.predict(data.validation)
    say("Predicting test rows.")
    test = predictor.predict(data.test)
    outside = {}
    for name, rows in data.ood.items():
        say(f"Predicting out-of-distribution rows: {name}.")
        outside[name] = predictor.predict(rows)
    detectors = fit_detectors(
        *_training_features(predictor, data, config),
        num_neighbours=config.evaluation.knn_neighbours,
    )
    scored = {"test": (test, data.test)} | {
        f"ood:{name}": (prediction, data.ood[name]) for name, prediction in outside.items()
    }
    scores = {split: judge.scores_of(part, detectors) for split, (part, _) in scored.items()}
    report = _report(run, config, plan, data, predictor, test, validation, scores)
    tables = [
        samples_table(split, part, rows, scores[split], data.label_names)
        for split, (part, rows) in scored.items()
    ]
    # A set without labels has a column of nulls: it takes the type of the others.
    table = pa.concat_tables(tables, promote_options="default")
    _write(run, report, table)
    _track(run, config, report)
    return report


def _read_plan(run: RunFolder) -> DropoutPlan:
    if not run.plan.is_file() or not run.model.is_dir():
        raise RunFolderError(
            f"{run.path} holds no trained model (looked for {run.plan.name} and {run.model.name}/). "
            "Train it first: `masklock train CONFIG`."
        )
    return DropoutPlan.from_json(json.loads(run.plan.read_text(encoding="utf-8")))


def _load(run: RunFolder, config: RunConfig, plan: DropoutPlan) -> tuple[PreparedData, Predictor]:
    own_tokenizer = config.model.model_copy(update={"tokenizer_name_or_path": str(run.model)})
    tokenizer = load_tokenizer(config.model_copy(update={"model": own_tokenizer}), [])
    data = prepare_data(config, load_raw(config), tokenizer)
    model = load_trained(run.model, config, data.label_names, plan, tokenizer)
    keyed = KeyedDropout(model, plan, config.seed)
    passes = config.evaluation.num_mc_passes
    predictor = Predictor(
        model,
        MODALITIES[config.model.task].collator(tokenizer, config),
        MonteCarlo(keyed, passes, strict=config.dropout.strict),
        batch_size=config.evaluation.batch_size,
        has_classes=data.label_names is not None,
    )
    return data, predictor


def _training_features(
    predictor: Predictor, data: PreparedData, config: RunConfig
) -> tuple[Tensor, Tensor | None]:
    keep = chosen(len(data.train), config.evaluation.max_fit_samples)
    features, labels = predictor.features(data.train if keep is None else data.train.select(keep))
    return features, labels if predictor.has_classes else None


# -- the report ----------------------------------------------------------------------------------


def _report(
    run: RunFolder,
    config: RunConfig,
    plan: DropoutPlan,
    data: PreparedData,
    predictor: Predictor,
    test: judge.Prediction,
    validation: judge.Prediction,
    scores: Mapping[str, judge.Scores],
) -> dict[str, Any]:
    if isinstance(test, ClassPrediction) and isinstance(validation, ClassPrediction):
        judged = judge.judge_classes(test, validation, config.evaluation, config.seed)
    else:
        assert isinstance(test, TokenPrediction)
        judged = judge.judge_tokens(test, config.evaluation, config.seed)
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
            "num_sites": len(plan.in_force()),
            "seconds": predictor.clock.seconds,
            "deterministic_seconds": predictor.clock.deterministic_seconds,
        },
        **judged,
        "ood": judge.ood_section(scores["test"], outside, config.evaluation, config.seed),
    }
    return {**report, "verdict": judge.verdict(report)}


def versions() -> dict[str, str]:
    """What this run was computed with."""
    packages = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "scikit-learn")
    found = {name: version(name) for name in packages}
    return (
        {"masklock": version("masklock"), "python": platform.python_version()}
        | found
        | {"mask kernel": active_kernel()}
    )


# -- one row a sample ----------------------------------------------------------------------------


def samples_table(
    split: str,
    prediction: judge.Prediction,
    rows: Any,
    scores: judge.Scores,
    label_names: tuple[str, ...] | None,
) -> pa.Table:
    """One row a sample: identity, prediction, uncertainty and every OOD score."""
    columns: dict[str, Any] = {
        "sample_id": prediction.sample_ids.tolist(),
        "split": [split] * len(prediction.sample_ids),
        "text": [text[:EXCERPT] for text in rows["text"]],
    }
    if isinstance(prediction, ClassPrediction):
        assert label_names is not None
        columns |= _class_columns(prediction, label_names)
    else:
        columns |= _token_columns(prediction)
    return pa.table(columns | scores)


def _class_columns(prediction: ClassPrediction, names: tuple[str, ...]) -> dict[str, Any]:
    passes, labels = prediction.monte_carlo, prediction.labels
    has_label = (labels >= 0).tolist()
    correct = (passes.prediction == labels).tolist()
    return {
        "label": [names[i] if i >= 0 else None for i in labels.tolist()],
        "prediction": [names[i] for i in passes.prediction.tolist()],
        "correct": [
            right if known else None for right, known in zip(correct, has_label, strict=True)
        ],
        "confidence": passes.confidence.tolist(),
        "deterministic_confidence": prediction.plain.confidence.tolist(),
        **{name: getattr(passes, name).tolist() for name in (*judge.ENTROPIES, "disagreement")},
    }


def _token_columns(prediction: TokenPrediction) -> dict[str, Any]:
    passes = prediction.monte_carlo
    return {
        "num_tokens": passes.num_tokens.tolist(),
        "log_probability": passes.log_probability.tolist(),
        "perplexity": passes.perplexity.tolist(),
        "deterministic_perplexity": prediction.plain.perplexity.tolist(),
        **{name: getattr(passes, name).tolist() for name in judge.ENTROPIES},
    }


# -- writing -------------------------------------------------------------------------------------


def _write(run: RunFolder, report: dict[str, Any], table: pa.Table) -> None:
    run.evaluation.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(run.samples, buffer.getvalue())
    write_json(run.report_json, report)


def _track(run: RunFolder, config: RunConfig, report: Mapping[str, Any]) -> None:
    """The headline numbers, for dashboards, at the last step of the training."""
    steps = [row["step"] for row in read_jsonl(run.metrics)] if run.metrics.is_file() else []
    tracker = open_tracker(config, run, is_main=True)
    tracker.start(config.model_dump(mode="json"), config.name)
    numbers = headline_numbers(report)
    tracker.log(numbers, max(steps, default=0))
    tracker.summary(numbers)
    tracker.finish()


def headline_numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """One flat number a measure, in the namespaces calibration/, uncertainty/ and ood/."""
    numbers = {}
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
