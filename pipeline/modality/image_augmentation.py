"""Augmentation of images, keyed by step and sample: the same picture on any layout.

Random resized crops: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015. RandAugment:
Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space",
NeurIPS 2020. Pillow draws; nothing here holds a generator.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from pipeline.config.augmentation import ImageAugmentation
from pipeline.modality.draws import uniform

Numbers = NDArray[np.float64]
Size = tuple[int, int]
_FILL = 128


def augment_images(
    images: Sequence[Image.Image],
    settings: ImageAugmentation,
    seed: int,
    step: int,
    sample_ids: list[int],
    size: Size,
) -> list[Image.Image]:
    """Every image under the draws of its own sample.

    Args:
        images: [N].
        settings: which augmentations, how strong.
        seed: the run's.
        step: of training.
        sample_ids: [N].
        size: width and height of a crop's result.
    """
    parts = [part for part in _PARTS if part.is_on(settings)]
    drawn = {
        part.name: uniform(seed, step, part.name, sample_ids, part.count(settings))
        for part in parts
    }
    augmented = []
    for place, image in enumerate(images):
        for part in parts:
            image = part.apply(image, drawn[part.name][place], settings, size)
        augmented.append(image)
    return augmented


# -- the parts, in the order in which they are applied -------------------------------------------


class Crop:
    """A part of the image with a random area and shape, brought to the model's size."""

    name = "crop"

    def is_on(self, settings: ImageAugmentation) -> bool:
        return settings.random_resized_crop is not None

    def count(self, settings: ImageAugmentation) -> int:
        return 4

    def apply(
        self,
        image: Image.Image,
        numbers: Numbers,
        settings: ImageAugmentation,
        size: Size,
    ) -> Image.Image:
        smallest = settings.random_resized_crop or 1.0
        area = image.width * image.height * (smallest + numbers[0] * (1 - smallest))
        shape = math.exp((2 * numbers[1] - 1) * math.log(4 / 3))
        width = min(image.width, max(1, round(math.sqrt(area * shape))))
        height = min(image.height, max(1, round(math.sqrt(area / shape))))
        left = round(numbers[2] * (image.width - width))
        top = round(numbers[3] * (image.height - height))
        box = (left, top, left + width, top + height)
        return image.resize(size, Image.Resampling.BICUBIC, box=box)


class Shift:
    """The image moved by at most so many pixels, the border filled by its mirror image."""

    name = "shift"

    def is_on(self, settings: ImageAugmentation) -> bool:
        return settings.shift_pixels > 0

    def count(self, settings: ImageAugmentation) -> int:
        return 2

    def apply(
        self,
        image: Image.Image,
        numbers: Numbers,
        settings: ImageAugmentation,
        size: Size,
    ) -> Image.Image:
        most = settings.shift_pixels
        padding = [(most, most), (most, most), (0, 0)][: np.asarray(image).ndim]
        padded = np.pad(np.asarray(image), padding, mode="symmetric")
        left, top = (int(number * (2 * most + 1)) for number in numbers)
        return Image.fromarray(padded[top : top + image.height, left : left + image.width])


class Flip:
    """Left and right exchanged, for half of the samples or another share."""

    name = "flip"

    def is_on(self, settings: ImageAugmentation) -> bool:
        return settings.horizontal_flip > 0

    def count(self, settings: ImageAugmentation) -> int:
        return 1

    def apply(
        self,
        image: Image.Image,
        numbers: Numbers,
        settings: ImageAugmentation,
        size: Size,
    ) -> Image.Image:
        return ImageOps.mirror(image) if numbers[0] < settings.horizontal_flip else image


class Colour:
    """Brightness, contrast and saturation, each times 1 - strength to 1 + strength."""

    name = "colour"
    _ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

    def is_on(self, settings: ImageAugmentation) -> bool:
        return settings.colour_jitter > 0

    def count(self, settings: ImageAugmentation) -> int:
        return len(self._ENHANCERS)

    def apply(
        self,
        image: Image.Image,
        numbers: Numbers,
        settings: ImageAugmentation,
        size: Size,
    ) -> Image.Image:
        for enhancer, number in zip(self._ENHANCERS, numbers, strict=True):
            image = enhancer(image).enhance(1 + settings.colour_jitter * (2 * number - 1))
        return image


class RandAugment:
    """So many operations chosen evenly, at one magnitude, each in a random direction."""

    name = "rand_augment"

    def is_on(self, settings: ImageAugmentation) -> bool:
        return settings.rand_augment_operations > 0

    def count(self, settings: ImageAugmentation) -> int:
        return 2 * settings.rand_augment_operations

    def apply(
        self,
        image: Image.Image,
        numbers: Numbers,
        settings: ImageAugmentation,
        size: Size,
    ) -> Image.Image:
        strength = settings.rand_augment_magnitude / 10
        for choice, direction in numbers.reshape(-1, 2):
            operation = OPERATIONS[int(choice * len(OPERATIONS))]
            image = operation(image, strength if direction < 0.5 else -strength)
        return image


_PARTS = (Crop(), Shift(), Flip(), Colour(), RandAugment())


# -- operations of RandAugment: strength in [-1, 1] ----------------------------------------------


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    fill = _FILL if image.mode == "L" else (_FILL,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=fill)


def _enhanced(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> "Operation":
    return lambda image, strength: enhancer(image).enhance(1 + 0.9 * strength)


Operation = Callable[[Image.Image, float], Image.Image]
OPERATIONS: tuple[Operation, ...] = (
    lambda image, strength: image,
    lambda image, strength: ImageOps.autocontrast(image),
    lambda image, strength: ImageOps.equalize(image),
    lambda image, strength: image.rotate(
        30 * strength, fillcolor=_FILL if image.mode == "L" else (_FILL,) * 3
    ),
    lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    lambda image, strength: ImageOps.solarize(image, 256 - round(256 * abs(strength))),
    _enhanced(ImageEnhance.Color),
    _enhanced(ImageEnhance.Contrast),
    _enhanced(ImageEnhance.Brightness),
    _enhanced(ImageEnhance.Sharpness),
    lambda image, strength: _affine(image, (1, 0.3 * strength, 0, 0, 1, 0)),
    lambda image, strength: _affine(image, (1, 0, 0, 0.3 * strength, 1, 0)),
    lambda image, strength: _affine(image, (1, 0, 0.45 * strength * image.width, 0, 1, 0)),
    lambda image, strength: _affine(image, (1, 0, 0, 0, 1, 0.45 * strength * image.height)),
)
