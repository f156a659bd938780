"""One training step of a BERT-like model: our trainer with keyed masks against the stock Trainer.

    python benchmarks/training_step.py

Same weights, batch, rates (0.1 everywhere) and loss arithmetic; forward and backward by each
trainer's own `training_step`, interleaved. The stock Trainer is timed with its default attention
(SDPA) and with eager attention. Ratios of ours to theirs, below 1 is faster.

The keyed path's share of a step is what the same step saves with every rate 0 and the same
attention. Three and a half minutes on two cores.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _timing import cpu_seconds
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from pipeline.callbacks import Meter
from pipeline.config.schema import RunConfig
from pipeline.data import TrainingStream
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.kernels import active_kernel
from pipeline.modality.bundle import MODALITIES
from pipeline.model import build_model, plan_for
from pipeline.records import RunFolder
from pipeline.trainer import LockedTrainer

LABELS = tuple("abcdefgh")
BATCH, LENGTH = 16, 64
MODEL = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
DEPTHS = (2, 12, 24)
SECONDS = 15.0  # a cell of the table, or five pairs


def run_config(num_layers: int, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "model": {
                "task": "text-classification",
                "model_type": "bert",
                "config_overrides": {**MODEL, "num_hidden_layers": num_layers},
            },
            "data": {"path": "unused"},
            **sections,
        }
    )


def arguments(folder: str) -> TrainingArguments:
    return TrainingArguments(
        folder, per_device_train_batch_size=BATCH, max_steps=1, use_cpu=True, report_to="none"
    )


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(5, 30000, (BATCH, LENGTH))
    labels = torch.randint(len(LABELS), (BATCH,))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def rows() -> Dataset:
    columns = {"input_ids": [[5]] * BATCH, "sample_id": list(range(BATCH))}
    return Dataset.from_dict(columns | {"labels": [0] * BATCH})


def locked_step(config: RunConfig, folder: str) -> Callable[[], Any]:
    plan = plan_for(config, LABELS)
    model = build_model(config, LABELS, plan).train()
    trainer = LockedTrainer(
        run=RunFolder(Path(folder)),
        train=config.train,
        keyed=KeyedDropout(model, plan, config.seed),
        modality=MODALITIES[config.model.task],
        facts={},
        meter=Meter(),
        checkpoint_bytes=0,
        model=model,
        args=arguments(folder),
        train_dataset=TrainingStream(rows(), config.seed, num_steps=1, global_batch_size=BATCH),
    )
    place = {"sample_id": torch.arange(BATCH), "mask_step": torch.zeros(BATCH, dtype=torch.int64)}
    return lambda: trainer.training_step(model, batch() | place, torch.tensor(BATCH))


def stock_step(config: RunConfig, folder: str, attention: str) -> Callable[[], Any]:
    bert = AutoConfig.for_model("bert", **config.model.config_overrides, num_labels=len(LABELS))
    model = AutoModelForSequenceClassification.from_config(bert, attn_implementation=attention)
    trainer = Trainer(model.train(), arguments(folder))
    return lambda: trainer.training_step(model, batch(), torch.tensor(BATCH))


def compare(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of our step, and the median ratio of interleaved pairs, in CPU time."""
    for step in (ours, theirs):
        step()
    mine, pairs = [], []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(pairs) < 5:
        a, b = cpu_seconds(ours), cpu_seconds(theirs)
        mine.append(a)
        pairs.append(a / b)
    return statistics.median(mine), statistics.median(pairs)


def without_dropout(num_layers: int) -> RunConfig:
    """The same model without a mask, and with the attention that masks need."""
    rates = dict.fromkeys(("embedding", "attention", "hidden", "head"), 0)
    config = run_config(num_layers, dropout=rates)
    attention = plan_for(run_config(num_layers), LABELS).attn_implementation
    model = config.model.model_copy(update={"attn_implementation": attention})
    return config.model_copy(update={"model": model})


def main() -> None:
    print(f"kernel {active_kernel()}, {torch.get_num_threads()} threads, {BATCH} x {LENGTH} tokens")
    print("| layers | our step, CPU s | ours / stock, sdpa | ours / stock, eager | keyed share |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for num_layers in DEPTHS:
            config = run_config(num_layers)
            ours = locked_step(config, folder)
            cells = []
            for attention in ("sdpa", "eager"):
                seconds, ratio = compare(ours, stock_step(config, folder, attention))
                cells.append(f"{ratio:.2f}")
            _, ratio = compare(ours, locked_step(without_dropout(num_layers), folder))
            cells.append(f"{1 - 1 / ratio:.1%}")
            print(f"| {num_layers} | {seconds:.3f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
