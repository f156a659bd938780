"""Digits with their written names, of which some are wrong: two channels that must be weighed.

The image is always of the label. The text names another digit in one row of five, so neither
channel alone gives what both give together: the scans are small and some are hard to read.

Two splits are out of distribution, each in one channel: patches of photographs beside the name of a
digit, and scans of digits beside the name of something else.
"""

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.corpora.digits import NAMES, NUM_EVALUATION_ROWS, patches, png, scans

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = ("this is a {}", "a handwritten {}", "the digit {}", "{}", "someone wrote {}")
OTHERS = ("horse", "letter", "house", "flower", "word", "tree", "ship", "face", "map", "bridge")
WRONG = 0.2
"""Share of rows whose text names another digit."""
NOISE = 0.35
"""Standard deviation of the noise in the images, of full scale: about a fifth become hard."""


def named_digits() -> "DatasetDict":
    """`image` (PNG, 8 x 8 grey, noisy), `text`, `label`, and `text_is_right`.

    Splits photographs and other_names: label -1, by the image and by the text.
    """
    from datasets import DatasetDict

    images, labels = scans()
    first, second = NUM_EVALUATION_ROWS, 2 * NUM_EVALUATION_ROWS
    whole = _dataset(images, labels, WORDS)
    found = patches()
    strange = _dataset(found, [place % 10 for place in range(len(found))], WORDS, "photograph ")
    named = _dataset(images[:first], labels[:first], OTHERS, "other ")
    return DatasetDict(
        train=whole.select(range(second, len(whole))),
        validation=whole.select(range(first, second)),
        test=whole.select(range(first)),
        photographs=strange,
        other_names=named,
    )


def _dataset(
    images: Any, labels: list[int], words: tuple[str, ...], strange: str = ""
) -> "Dataset":
    """Rows of images and the words for their labels.

    Strange rows have no label, and noise and phrases of their own, drawn under this name.
    """
    from datasets import ClassLabel, Dataset, Features, Image, Value

    features = Features(
        {
            "image": Image(decode=False),
            "text": Value("string"),
            "label": ClassLabel(names=list(NAMES)),
            "text_is_right": Value("bool"),
        }
    )
    places = [f"{strange}{place}" for place in range(len(labels))]
    named = [_named(place, label) for place, label in zip(places, labels, strict=True)]
    columns = {
        "image": [
            {"bytes": png(_noisy(image, place)), "path": None}
            for place, image in zip(places, images, strict=True)
        ],
        "text": [_phrase(place, words[name]) for place, name in zip(places, named, strict=True)],
        "label": [-1] * len(labels) if strange else labels,
        "text_is_right": [
            not strange and name == label for name, label in zip(named, labels, strict=True)
        ],
    }
    return Dataset.from_dict(columns, features=features)


def _named(place: str, label: int) -> int:
    """The digit that the text names."""
    wrong, other = _drawn(f"name {place}", 2)
    return (label + 1 + int(other * 9)) % 10 if wrong < WRONG else label


def _phrase(place: str, name: str) -> str:
    return PHRASES[int(_drawn(f"phrase {place}", 1)[0] * len(PHRASES))].format(name)


def _noisy(image: np.ndarray, place: str) -> np.ndarray:
    """Noise that is nearly normal: twelve uniform numbers, added."""
    drawn = _drawn(f"noise {place}", 12 * image.size).reshape(12, *image.shape).sum(0) - 6
    return np.clip(image + 255 * NOISE * drawn, 0, 255).astype(np.uint8)


def _drawn(what: str, count: int) -> np.ndarray:
    """Numbers in [0, 1) that follow from a text: the same on every machine."""
    data = hashlib.shake_128(what.encode()).digest(4 * count)
    return np.frombuffer(data, dtype="<u4") / 2**32
