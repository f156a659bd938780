"""What training minimises: the modality's loss, and what dropout adds to it.

R-Drop: Liang et al., "R-Drop: Regularized Dropout for Neural Networks", NeurIPS 2021: two views of
each sample under different masks,

    loss = mean of both cross entropies + alpha * (KL(view 1 | view 2) + KL(view 2 | view 1)) / 2

Concrete dropout: see `dropout/concrete.py`. Every micro-batch brings its share, so that 16
and 4 x 4 samples a step have the same gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.training import TrainConfig
from pipeline.dropout.concrete import learned_rates_of
from pipeline.dropout.key import view_of
from pipeline.modality.losses import IGNORED, LossFunction, logits_of, symmetric_divergence_sum

VIEWS = (1, 2)


class Objective:
    """The Trainer's `compute_loss_func`: sum over the items of a micro-batch / items of the step.

    Args:
        loss: the modality's.
        train: the configuration's `train` section.
        model: the model, with its learned rates if it has any.
        num_rows: samples trained on.
    """

    def __init__(
        self, loss: LossFunction, train: TrainConfig, model: nn.Module, num_rows: int
    ) -> None:
        self.loss, self.alpha, self.model = loss, train.r_drop_alpha, model
        self.rates = learned_rates_of(model)
        self.num_rows = num_rows

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        num_rows = len(labels) // (len(VIEWS) if self.alpha else 1)
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:num_rows] != IGNORED).sum().clamp(min=1)
        items = torch.as_tensor(num_items_in_batch, device=labels.device)
        loss = self.loss(outputs, labels, items)
        if self.alpha:
            divergence = symmetric_divergence_sum(logits_of(outputs), labels)
            loss = loss / len(VIEWS) + self.alpha * divergence / items.to(divergence.device)
        if self.rates is not None:
            # Items of all rows: those of this step, times rows / global batch. Of the term that
            # belongs to the step this micro-batch brings its share of the rows.
            share = num_rows / self.num_rows / items.to(loss.device)
            loss = loss + share * self.rates.regulariser(self.model)
        return loss

    def views(
        self, inputs: dict[str, Any], sample_ids: Tensor
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Inputs, sample ids and row ids: as they are, or under R-Drop once for each view."""
        if not self.alpha:
            return inputs, sample_ids, sample_ids
        doubled = {name: torch.cat([rows] * len(VIEWS)) for name, rows in inputs.items()}
        row_ids = torch.cat([view_of(sample_ids, view) for view in VIEWS])
        return doubled, torch.cat([sample_ids] * len(VIEWS)), row_ids
