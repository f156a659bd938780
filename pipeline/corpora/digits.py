"""Handwritten digits that scikit-learn carries, and as another kind of image its photographs.

Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998:
1,797 scans of 8 x 8 pixels.
"""

import hashlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from numpy.typing import NDArray

NUM_EVALUATION_ROWS = 300  # in each of validation and test
NUM_PATCHES = 300
SIZE = 8
NAMES = tuple("0123456789")


def digits() -> "DatasetDict":
    """`image` (PNG, 8 x 8 grey) and `label`; split ood: patches of photographs, label -1."""
    from datasets import DatasetDict

    images, labels = scans()
    first, second = NUM_EVALUATION_ROWS, 2 * NUM_EVALUATION_ROWS
    return DatasetDict(
        train=_dataset(images[second:], labels[second:]),
        validation=_dataset(images[first:second], labels[first:second]),
        test=_dataset(images[:first], labels[:first]),
        ood=_dataset(patches(), [-1] * NUM_PATCHES),
    )


def scans() -> "tuple[NDArray[np.uint8], list[int]]":
    """All digits [1797, 8, 8] with their labels, in an order given by their pixels alone."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    order = sorted(range(len(images)), key=lambda i: (_hash(images[i].tobytes()), i))
    return images[order], found.target[order].tolist()


def png(pixels: "NDArray[np.uint8]") -> bytes:
    """Pixels as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def patches() -> "list[NDArray[np.uint8]]":
    """Parts of scikit-learn's two photographs, brought to the size of a digit."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image).convert("L") for image in load_sample_images().images]
    patches = []
    for number in range(NUM_PATCHES):
        drawn = np.frombuffer(_hash(f"patch {number}".encode()), dtype="<u4") / 2**32
        photograph = photographs[number % len(photographs)]
        edge = 16 + int(drawn[0] * 80)
        left = int(drawn[1] * (photograph.width - edge))
        top = int(drawn[2] * (photograph.height - edge))
        box = (left, top, left + edge, top + edge)
        patches.append(np.asarray(photograph.resize((SIZE, SIZE), box=box)))
    return patches


def _dataset(images: Any, labels: list[int]) -> "Dataset":
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(decode=False), "label": ClassLabel(names=list(NAMES))})
    files = [{"bytes": png(image), "path": None} for image in images]
    return Dataset.from_dict({"image": files, "label": labels}, features=features)


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
