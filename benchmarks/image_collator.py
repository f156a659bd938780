"""Images a second of the collator, and what drawing by key costs, at 224 x 224 from 256 x 256 JPEG.

Run: python benchmarks/image_collator.py. Unkeyed: the same transforms with numbers of numpy's
generator. The two are timed alternately, by CPU time; the loader with workers by the wall.
"""

import io
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
from _timing import cpu_seconds, wall_seconds
from PIL import Image
from torch.utils.data import DataLoader

from pipeline.config.schema import RunConfig
from pipeline.modality import MODALITIES, image_augmentation

NUM_ROWS, BATCH_SIZE, NUM_REPEATS = 256, 32, 7
TASK = MODALITIES["image-classification"]
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


def main() -> None:
    rows = photographs()
    collate = TASK.collator(TASK.load_processor(CONFIG), CONFIG)
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, NUM_ROWS, BATCH_SIZE)]
    generator = np.random.default_rng(1)

    def keyed() -> None:
        for batch in batches:
            collate(batch)

    def unkeyed() -> None:
        def draw(seed: int, step: int, name: str, ids: list[int], count: int) -> Any:
            return generator.random((len(ids), count))

        with patch.object(image_augmentation, "uniform", draw):
            keyed()

    def loaded(workers: int) -> float:
        loader = DataLoader(rows, BATCH_SIZE, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]
        return wall_seconds(lambda: list(loader))

    keyed()
    pairs = [(cpu_seconds(keyed), cpu_seconds(unkeyed)) for _ in range(NUM_REPEATS)]
    ours, theirs = (median(column) for column in zip(*pairs, strict=True))
    ratio = median(a / b for a, b in pairs)
    print(f"keyed    {NUM_ROWS / ours:8.0f} images a CPU second")
    print(f"unkeyed  {NUM_ROWS / theirs:8.0f} images a CPU second   keyed takes {ratio:.2f}x")
    for workers in (0, 2):
        seconds = median(loaded(workers) for _ in range(3))
        print(f"{workers} workers{NUM_ROWS / seconds:8.0f} images a second by the wall")


if __name__ == "__main__":
    main()
