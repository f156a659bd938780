"""Evaluation during training: sums over the validation rows, each counted once by all processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from pipeline import parallel
from pipeline.modality.bundle import Modality

Batch = dict[str, Tensor]
NOT_INPUTS = ("sample_id", "domain")
"""What rows carry for masks, not for the model."""


def validation_sums(
    model: nn.Module,
    rows: Any,
    modality: Modality,
    collate: Callable[[list[dict[str, Any]]], Batch],
    batch_size: int,
    to_device: Callable[[Batch], Batch],
) -> dict[str, Tensor]:
    """The modality's sums, added over all batches and processes."""
    totals: dict[str, Tensor] = {}
    with evaluating(model), torch.no_grad():
        for batch, counts in batches(rows, collate, batch_size):
            inputs = to_device(batch)
            labels = inputs.pop("labels")
            inputs = {name: value for name, value in inputs.items() if name not in NOT_INPUTS}
            sums = modality.eval_sums(model(**inputs).logits, labels)
            for name, value in sums.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value * counts
    return {name: parallel.sum_over_ranks(value) for name, value in totals.items()}


def batches(
    rows: Any, collate: Callable[[list[dict[str, Any]]], Batch], batch_size: int
) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, and whether they count: an idle one only keeps step with the others.

    The forward pass of a sharded model is collective: a process that ran fewer would hang the rest.
    """
    mine, num_idle = share(len(rows), parallel.rank(), parallel.world_size(), batch_size)
    for batch in DataLoader(Subset(rows, mine), batch_size=batch_size, collate_fn=collate):
        yield batch, True
    for _ in range(num_idle):
        yield collate([rows[0]]), False


def share(num_rows: int, rank: int, world_size: int, batch_size: int) -> tuple[list[int], int]:
    """The rows of one process, and how many idle batches bring it to the number of the others."""
    mine = list(range(rank, num_rows, world_size))
    largest = -(-num_rows // world_size)
    return mine, -(-largest // batch_size) - -(-len(mine) // batch_size)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; modules frozen in evaluation mode stay so."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
