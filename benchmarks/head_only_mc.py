"""Head-only Monte-Carlo dropout against full passes: 30 passes over one batch of a 12-layer BERT.

    python benchmarks/head_only_mc.py

Where only the head's dropout is live, the body's answer is the same in every pass: it runs once.
Both give the same numbers; CPU time, interleaved, medians.
"""

import statistics
from collections.abc import Callable

import torch
from _timing import cpu_seconds
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.kernels import active_kernel
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.model import build_model, plan_for

LABELS = tuple("abcdefgh")
NUM_PASSES, BATCH, LENGTH = 30, 32, 64
MODEL = {
    "num_hidden_layers": 12,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
}
NUM_ROUNDS = 3


def keyed_model() -> KeyedDropout:
    config = RunConfig.model_validate(
        {
            "name": "benchmark",
            "model": {
                "task": "text-classification",
                "model_type": "bert",
                "config_overrides": MODEL,
            },
            "data": {"path": "unused"},
            "dropout": {"embedding": 0, "attention": 0, "hidden": 0, "head": 0.1},
        }
    )
    plan = plan_for(config, LABELS)
    return KeyedDropout(build_model(config, LABELS, plan).eval(), plan, config.seed)


def monte_carlo(keyed: KeyedDropout, head_only: bool, results: list[Tensor]) -> Callable[[], None]:
    """All passes over one batch, kept as [T, N, C]; the audit of the first batch is not timed."""
    passes = MonteCarlo(keyed, NUM_PASSES)
    if not head_only:
        passes.body = None
    ids = torch.randint(5, 30000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    next(passes.passes(inputs, torch.arange(BATCH)))
    return lambda: results.append(torch.stack(list(passes.passes(inputs, torch.arange(BATCH)))))


def main() -> None:
    keyed = keyed_model()
    results: list[Tensor] = []
    quick, full = (monte_carlo(keyed, head_only, results) for head_only in (True, False))
    rounds = [(cpu_seconds(quick), cpu_seconds(full)) for _ in range(NUM_ROUNDS)]
    fast, slow = (statistics.median(column) for column in zip(*rounds, strict=True))
    difference = (results[0] - results[1]).abs().max().item()
    ratio = statistics.median(b / a for a, b in rounds)
    print(
        f"kernel {active_kernel()}, {torch.get_num_threads()} threads, {NUM_PASSES} passes, "
        f"{BATCH} x {LENGTH} tokens, largest difference of logits {difference:.1e}"
    )
    print(f"full passes            {slow:8.2f} CPU s")
    print(f"body once, head only   {fast:8.2f} CPU s")
    print(f"ratio                  {ratio:8.1f}")


if __name__ == "__main__":
    main()
