"""Tiny models with keyed dropout, and rows of unlike lengths, for the tests of the passes."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from pipeline.config.schema import RunConfig
from pipeline.dropout.context import KeyedDropout
from pipeline.evaluation.forward import bare_model
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.evaluation.predict import Predictor
from pipeline.model import build_model, plan_for

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
            has_classes=has_classes,
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
