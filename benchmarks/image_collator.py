"""Images a second of the collator, and what drawing by key costs, at 224 x 224 from 256 x 256 JPEG.

Run: python benchmarks/image_collator.py. Unkeyed: the same transforms with numbers of numpy's
generator.
"""

import io
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import numpy as np
from _collating import NUM_ROWS, compare
from PIL import Image

from pipeline.config.schema import RunConfig
from pipeline.modality import image_augmentation

CONFIG = RunConfig(
    name="benchmark",
    model={
        "task": "image-classification",
        "model_type": "vit",
        "config_overrides": {"image_size": 224},
    },
    data={
        "path": "unused",
        "augmentation": {
            "image": {
                "random_resized_crop": 0.35,
                "horizontal_flip": 0.5,
                "rand_augment_operations": 2,
            }
        },
    },
)


def photographs() -> list[dict[str, Any]]:
    generator, rows = np.random.default_rng(0), []
    for number in range(NUM_ROWS):
        rough = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(rough).resize((256, 256)).save(file, "JPEG")
        image = {"bytes": file.getvalue(), "path": None}
        rows.append({"image": image, "labels": 0, "sample_id": number, "mask_step": 3})
    return rows


def unkeyed_draws(generator: np.random.Generator) -> AbstractContextManager[Any]:
    def draw(seed: int, step: int, name: str, ids: list[int], count: int) -> Any:
        return generator.random((len(ids), count))

    return patch.object(image_augmentation, "uniform", draw)


if __name__ == "__main__":
    compare(CONFIG, photographs(), unkeyed_draws, "images")
