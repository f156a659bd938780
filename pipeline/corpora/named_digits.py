"""Digits with their written names, of which some are wrong: two channels that must be weighed.

The image is always of the label. The text names another digit in one row of five, so neither
channel alone gives what both give together: the scans are small and some are hard to read.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from pipeline.corpora.digits import NAMES, NUM_EVALUATION_ROWS, png, scans

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = ("this is a {}", "a handwritten {}", "the digit {}", "{}", "someone wrote {}")
WRONG = 0.2
"""Share of rows whose text names another digit."""
NOISE = 0.35
"""Standard deviation of the noise in the images, of full scale: about a fifth become hard."""


def named_digits() -> "DatasetDict":
    """`image` (PNG, 8 x 8 grey, noisy), `text`, `label`, and `text_is_right`."""
    from datasets import DatasetDict

    images, labels = scans()
    first, second = NUM_EVALUATION_ROWS, 2 * NUM_EVALUATION_ROWS
    whole = _dataset(images, labels)
    return DatasetDict(
        train=whole.select(range(second, len(whole))),
        validation=whole.select(range(first, second)),
        test=whole.select(range(first)),
    )


def _dataset(images: np.ndarray, labels: list[int]) -> "Dataset":
    from datasets import ClassLabel, Dataset, Features, Image, Value

    features = Features(
        {
            "image": Image(decode=False),
            "text": Value("string"),
            "label": ClassLabel(names=list(NAMES)),
            "text_is_right": Value("bool"),
        }
    )
    named = [_named(place, label) for place, label in enumerate(labels)]
    columns = {
        "image": [
            {"bytes": png(_noisy(image, place)), "path": None} for place, image in enumerate(images)
        ],
        "text": [_phrase(place, name) for place, name in enumerate(named)],
        "label": labels,
        "text_is_right": [name == label for name, label in zip(named, labels, strict=True)],
    }
    return Dataset.from_dict(columns, features=features)


def _named(place: int, label: int) -> int:
    """The digit that the text names."""
    wrong, other = _drawn(f"name {place}", 2)
    return (label + 1 + int(other * 9)) % 10 if wrong < WRONG else label


def _phrase(place: int, name: int) -> str:
    return PHRASES[int(_drawn(f"phrase {place}", 1)[0] * len(PHRASES))].format(WORDS[name])


def _noisy(image: np.ndarray, place: int) -> np.ndarray:
    """Noise that is nearly normal: twelve uniform numbers, added."""
    drawn = _drawn(f"noise {place}", 12 * image.size).reshape(12, *image.shape).sum(0) - 6
    return np.clip(image + 255 * NOISE * drawn, 0, 255).astype(np.uint8)


def _drawn(what: str, count: int) -> np.ndarray:
    """Numbers in [0, 1) that follow from a text: the same on every machine."""
    data = hashlib.shake_128(what.encode()).digest(4 * count)
    return np.frombuffer(data, dtype="<u4") / 2**32
