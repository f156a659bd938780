"""The `data.augmentation` section: how training samples are varied, keyed by step and sample."""

from typing import Annotated

from pydantic import Field

from pipeline.config.roles import Rate, Section

NonNegative = Annotated[float, Field(ge=0.0)]

Decibels = Annotated[list[float], Field(min_length=2, max_length=2)]


class ImageAugmentation(Section):
    """Of images; nothing by default."""

    random_resized_crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Smallest share of the area that a crop keeps, such as 0.35; the crop is brought to the model's size."""
    shift_pixels: Annotated[int, Field(ge=0)] = 0
    """Move by at most so many pixels, the border mirrored (small images)."""
    horizontal_flip: Rate = 0.0
    """Share of samples whose left and right are exchanged."""
    colour_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Brightness, contrast and saturation change by at most this share."""
    rand_augment_operations: Annotated[int, Field(ge=0)] = 0
    """RandAugment: operations a sample."""
    rand_augment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """RandAugment: their strength, 0 to 10."""
    mixup_alpha: NonNegative = 0.0
    """Mixup with a partner from the global batch: parameter of the Beta distribution of the share."""
    cutmix_alpha: NonNegative = 0.0
    """CutMix, the same; with both, each pair takes one of the two by key."""


class AudioAugmentation(Section):
    """Of audio; nothing by default."""

    noise_snr_db: Decibels | None = None
    """White noise at a signal-to-noise ratio between these, in decibels."""
    speed: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Speed changes by at most this share (and pitch with it)."""
    gain_db: NonNegative = 0.0
    """Louder or softer by at most so many decibels."""


class Augmentation(Section):
    """Variations of training samples; evaluation sees them as they are."""

    image: ImageAugmentation = ImageAugmentation()
    audio: AudioAugmentation = AudioAugmentation()
