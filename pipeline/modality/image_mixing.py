"""Mixup and CutMix with a partner of the same global batch, by key: no process asks another.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix:
Regularization Strategy to Train Strong Classifiers", ICCV 2019.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.config.augmentation import ImageAugmentation
from pipeline.config.schema import RunConfig
from pipeline.modality.draws import uniform

Batch = dict[str, Tensor]


def is_mixing(settings: ImageAugmentation) -> bool:
    """Whether samples need a partner."""
    return bool(settings.mixup_alpha or settings.cutmix_alpha)


def mixed(batch: Batch, partners: Batch, config: RunConfig, ids: list[int], step: int) -> Batch:
    """Pixels [B, C, H, W] of pairs, and their labels [B, 3]: own class, partner's, own share.

    `losses.classification_loss` weighs the two by the share.
    """
    settings = config.data.augmentation.image
    numbers = uniform(config.seed, step, "mix", ids, 4)
    made = [
        _mix(settings, drawn[0])(own, other, settings, drawn[1:])
        for own, other, drawn in zip(
            batch["pixel_values"], partners["pixel_values"], numbers, strict=True
        )
    ]
    shares = torch.tensor([share for _, share in made], dtype=torch.float64)
    labels = torch.stack([batch["labels"].double(), partners["labels"].double(), shares], dim=1)
    return {"pixel_values": torch.stack([pixels for pixels, _ in made]), "labels": labels}


Mix = Callable[[Tensor, Tensor, ImageAugmentation, np.ndarray], tuple[Tensor, float]]


def _mix(settings: ImageAugmentation, number: float) -> Mix:
    if settings.mixup_alpha and settings.cutmix_alpha:
        return _cutmix if number < 0.5 else _mixup
    return _cutmix if settings.cutmix_alpha else _mixup


def _mixup(
    own: Tensor, other: Tensor, settings: ImageAugmentation, drawn: np.ndarray
) -> tuple[Tensor, float]:
    share = _beta(drawn[0], settings.mixup_alpha)
    return share * own + (1 - share) * other, share


def _cutmix(
    own: Tensor, other: Tensor, settings: ImageAugmentation, drawn: np.ndarray
) -> tuple[Tensor, float]:
    """A box of the partner, wherever it fits; the share follows from its true area."""
    height, width = own.shape[-2:]
    side = np.sqrt(1 - _beta(drawn[0], settings.cutmix_alpha))
    tall, wide = round(height * side), round(width * side)
    top, left = round(drawn[1] * (height - tall)), round(drawn[2] * (width - wide))
    pixels = own.clone()
    box = (..., slice(top, top + tall), slice(left, left + wide))
    pixels[box] = other[box]
    return pixels, 1 - tall * wide / (height * width)


def _beta(number: float, alpha: float) -> float:
    from scipy.stats import beta

    return float(beta.ppf(number, alpha, alpha))
