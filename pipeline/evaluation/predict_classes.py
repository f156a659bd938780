"""What a classifier says about rows: one distribution over classes each."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluation.forward import PlainPass, on_cpu
from pipeline.evaluation.uncertainty import MonteCarloSums, Uncertainty


@dataclass(frozen=True)
class ClassPrediction:
    """What a classifier says about N rows, in one plain pass and in T Monte-Carlo passes."""

    sample_ids: Tensor  # [N] int64
    features: Tensor  # [N, D] float32: what the last layer reads
    logits: Tensor  # [N, C] float32, of the plain pass
    labels: Tensor  # [N] int64, -1 where a row has none
    plain: Uncertainty
    monte_carlo: Uncertainty


def predict_classes(
    batch: dict[str, Tensor], plain: PlainPass, passes: Iterable[Tensor]
) -> ClassPrediction:
    """From the logits [B, C] of the plain pass and of each Monte-Carlo pass."""
    plain_sums, sums = MonteCarloSums(), MonteCarloSums()
    plain_sums.update(plain.logits)
    for logits in passes:
        sums.update(logits)
    return ClassPrediction(
        sample_ids=batch["sample_id"].cpu(),
        features=plain.features,
        logits=plain.logits.float().cpu(),
        labels=class_labels(batch),
        plain=on_cpu(plain_sums.result()),
        monte_carlo=on_cpu(sums.result()),
    )


def class_labels(batch: dict[str, Tensor]) -> Tensor:
    return batch["labels"].cpu() if "labels" in batch else no_labels(batch)


def no_labels(batch: dict[str, Tensor]) -> Tensor:
    return torch.full_like(batch["sample_id"], -1, device="cpu")
