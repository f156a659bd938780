"""A BERT-like step by the doors of attention dropout: eager, the interface, and compiled whole.

    python benchmarks/attention_doors.py [--compile]

Forward and backward inside a mask context, rates 0.1, interleaved, median CPU seconds. Compiling
takes a minute and a C++ compiler; a step is timed after it.
"""

import statistics
import sys
from collections.abc import Callable

import torch
from _timing import cpu_seconds
from training_step import BATCH, LABELS, LENGTH, run_config

from pipeline.config.schema import RunConfig
from pipeline.dropout.context import KeyedDropout
from pipeline.model import build_model, plan_for

ROUNDS, LAYERS = 12, 2


def step_of(attention: str, compiled: bool = False) -> Callable[[], None]:
    config: RunConfig = run_config(LAYERS, train={})
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"attn_implementation": attention})}
    )
    plan = plan_for(config, LABELS)
    model = build_model(config, LABELS, plan).train()
    keyed = KeyedDropout(model, plan, 0)
    forward = torch.compile(model, fullgraph=True) if compiled else model
    ids = torch.randint(5, 1000, (BATCH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    steps = iter(range(10**9))

    def step() -> None:
        model.zero_grad()
        with keyed.context(purpose="train", index=next(steps), row_ids=torch.arange(BATCH)):
            forward(**batch).logits.square().sum().backward()

    return step


def main() -> None:
    doors = {"eager": step_of("eager"), "interface": step_of("keyed")}
    if "--compile" in sys.argv:
        doors["interface, compiled"] = step_of("keyed", compiled=True)
    for step in doors.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in doors}
    for _ in range(ROUNDS):
        for name, step in doors.items():
            times[name].append(cpu_seconds(step))
    print("| door | CPU s | ratio to eager |\n|---|---|---|")
    for name, seconds in times.items():
        pairs = [mine / eager for mine, eager in zip(seconds, times["eager"], strict=True)]
        print(f"| {name} | {statistics.median(seconds):.3f} | {statistics.median(pairs):.2f} |")


if __name__ == "__main__":
    main()
