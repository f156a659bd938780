"""Tiny models with keyed dropout, rows of unlike lengths, and whole runs that were evaluated."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from pipeline.config.load import dump_config
from pipeline.config.schema import RunConfig
from pipeline.data import load_raw
from pipeline.dropout.context import KeyedDropout
from pipeline.evaluation.forward import bare_model
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.evaluation.predict import Predictor
from pipeline.evaluation.stage import evaluate
from pipeline.modality.language import token_lengths
from pipeline.modality.tokenizer import load_tokenizer
from pipeline.model import build_model, plan_for
from pipeline.records import RunFolder, write_json

LABELS, VOCABULARY = ("a", "b", "c"), 50
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
}
EVERYWHERE = {"embedding": 0.1, "attention": 0.2, "hidden": 0.1, "head": 0.3}


@pytest.fixture
def bind(tmp_path):
    """A model of a few thousand random weights with its dropout keyed."""

    def config(task, kind, dropout, origin, peft=None):
        return RunConfig.model_validate(
            {
                "name": "tiny",
                "seed": 11,
                "model": {"task": task, "model_type": kind, "config_overrides": SHAPE} | origin,
                "data": {"path": "json", "max_length": 32},
                "dropout": dropout,
                "peft": peft,
            }
        )

    def bind(kind="bert", task=None, dropout=EVERYWHERE, peft=None):
        task = task or ("text-classification" if kind == "bert" else "text-generation")
        labels = LABELS if task == "text-classification" else None
        run = config(task, kind, {} if peft else dropout, {})
        if peft:  # adapters go on saved weights
            base = build_model(run, labels, plan_for(run, labels))
            base.save_pretrained(tmp_path / kind)
            origin = {"model_name_or_path": str(tmp_path / kind), "model_type": None}
            run = config(task, kind, dropout, origin | {"config_overrides": {}}, peft)
        plan = plan_for(run, labels)
        model = build_model(run, labels, plan).eval()
        if kind == "bert":  # rounding far below 1e-6; Llama's attention is float32 in any case
            model.double()
        generator = torch.Generator().manual_seed(3)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero at first: dropout before it would change nothing
                weight.data.normal_(std=0.5, generator=generator)
        return KeyedDropout(model, plan, run.seed)

    return bind


@pytest.fixture
def make_predictor():
    """A predictor over a bound model; rows are padded on the right, or on the left."""

    def make(keyed, batch_size=7, num_passes=4, left=False, **options):
        has_classes = "ForSequenceClassification" in type(bare_model(keyed.model)).__name__
        return Predictor(
            keyed.model,
            lambda rows: padded(rows, left, causal=not has_classes),
            MonteCarlo(keyed, num_passes, **options),
            batch_size=batch_size,
            predicts="classes" if has_classes else "next_tokens",
            lengths=token_lengths,
        )

    return make


def padded(rows, left, causal):
    width = max(len(row["input_ids"]) for row in rows)

    def pad(values, filler):
        fill = [filler] * (width - len(values))
        return torch.tensor(fill + values if left else values + fill)

    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": torch.stack([pad(row, 0) for row in ids]),
        "attention_mask": torch.stack([pad([1] * len(row), 0) for row in ids]),
        "sample_id": torch.tensor([row["sample_id"] for row in rows]),
    }
    if causal:
        batch["labels"] = torch.stack([pad([-100, *row[1:]], -100) for row in ids])
    elif "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


@pytest.fixture
def rows():
    """13 rows of 2 to 9 tokens, with labels; ids are neither sorted nor dense."""
    random = np.random.default_rng(5)
    return Dataset.from_list(
        [
            {
                "sample_id": int(100 + 37 * number % 91),
                "input_ids": random.integers(1, VOCABULARY, 2 + number * 5 % 8).tolist(),
                "labels": number % 3,
            }
            for number in range(13)
        ]
    )


# -- whole runs -----------------------------------------------------------------------------------

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
WORDS = ["red", "blue", "green", "pink", "cat", "dog", "cow", "hen"]
CLASSES, GENERATION = "text-classification", "text-generation"
SIZES = {"train": 30, "validation": 12, "test": 21}


def text(number, words=WORDS):
    return " ".join(words[(number * 7 + place * 3) % 8] for place in range(3 + number % 6))


def write_data(folder):
    for split, size in SIZES.items():
        labels = [("animal", "colour", "plant")[(number * number) % 3] for number in range(size)]
        rows = {"text": [text(number) for number in range(size)], "label": labels}
        own = {"price": [number / 4 for number in range(size)]}
        own["place"] = [("web", "forum", "mail")[number % 3] for number in range(size)]
        pd.DataFrame(rows | own).to_parquet(folder / f"{split}.parquet")
    far = [json.dumps({"text": text(number, WORDS[::-1]) * 2}) for number in range(15)]
    (folder / "far.jsonl").write_text("\n".join(far))


def config_in(folder, task):
    kind, dropout = ("bert", {"hidden": 0.1, "attention": 0.1, "head": 0.3})
    dropout["domains"] = {"forum": {"hidden": 0.3}}
    if task == GENERATION:
        kind, dropout = ("llama", {"insert": {"embedding": 0.1, "hidden": 0.2}})
    files = {split: str(folder / f"{split}.parquet") for split in SIZES}
    far = {"path": "json", "data_files": str(folder / "far.jsonl")}
    origin = {"model_type": kind, "config_overrides": TINY, "tokenizer_vocab_size": 300}
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "output_dir": str(folder),
            "model": {"task": task} | origin,
            "data": {
                "path": "parquet",
                "data_files": files,
                "max_length": 12,
                "ood": {"far": far},
                "domain_column_name": "place" if task == CLASSES else None,
            },
            "train": {"global_batch_size": 4, "use_cpu": True},
            "dropout": dropout,
            "evaluation": {
                "num_mc_passes": 5,
                "batch_size": 8,
                "num_bootstrap_resamples": 50,
                "knn_neighbours": 3,
            },
            "wandb": {"mode": "disabled"},
        }
    )


def save_run(config):
    """A run folder as a training leaves it, with random weights."""
    run = RunFolder(f"{config.output_dir}/{config.name}")
    raw = load_raw(config)
    tokenizer = load_tokenizer(config, raw.train["text"][:])
    plan = plan_for(config, raw.label_names, tokenizer)
    build_model(config, raw.label_names, plan, tokenizer).save_pretrained(run.model)
    tokenizer.save_pretrained(run.model)
    write_json(run.plan, plan.to_json())
    if raw.label_names is not None:
        write_json(run.labels, list(raw.label_names))
    run.config.write_text(dump_config(config))
    run.metrics.write_text('{"time": 1.0, "step": 40, "train/loss": 1.5}\n')
    return run


@pytest.fixture(scope="module")
def without_wandb():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield


@pytest.fixture(scope="module", params=[CLASSES, GENERATION])
def evaluated(request, without_wandb, tmp_path_factory):
    return evaluated_run(tmp_path_factory.mktemp("run"), request.param)


@pytest.fixture(scope="module")
def classifier(without_wandb, tmp_path_factory):
    return evaluated_run(tmp_path_factory.mktemp("classifier"), CLASSES)


@pytest.fixture(scope="module")
def language_model(without_wandb, tmp_path_factory):
    return evaluated_run(tmp_path_factory.mktemp("language_model"), GENERATION)


def evaluated_run(folder, task):
    write_data(folder)
    config = config_in(folder, task)
    run = save_run(config)
    said, kept = [], []
    report = evaluate(run, config, said.append, keep_profile=lambda run, rows: kept.append(rows))
    return SimpleNamespace(
        run=run,
        config=config,
        report=report,
        samples=pd.read_parquet(run.samples),
        said=said,
        reference=kept[0],
        test_file=folder / "test.parquet",
    )
