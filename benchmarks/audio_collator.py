"""Clips a second of the collator, and what drawing by key costs, for two seconds at 16 kHz.

Run: python benchmarks/audio_collator.py. Unkeyed: the same changes with numbers of numpy's
generator. The two are timed alternately, by CPU time; the loader with workers by the wall.
"""

import io
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import soundfile
from _timing import cpu_seconds, wall_seconds
from torch.utils.data import DataLoader

from pipeline.config.schema import RunConfig
from pipeline.modality import MODALITIES, audio_augmentation

NUM_ROWS, BATCH_SIZE, NUM_REPEATS, RATE = 256, 32, 7, 16_000
TASK = MODALITIES["audio-classification"]
CONFIG = RunConfig(
    name="benchmark",
    model={"task": "audio-classification", "model_type": "wav2vec2", "sampling_rate": RATE},
    data={
        "path": "unused",
        "augmentation": {"audio": {"speed": 0.1, "gain_db": 6, "noise_snr_db": [5, 20]}},
    },
)


def clips() -> list[dict[str, Any]]:
    generator, rows = np.random.default_rng(0), []
    for number in range(NUM_ROWS):
        file = io.BytesIO()
        soundfile.write(file, 0.1 * generator.standard_normal(2 * RATE), RATE, format="WAV")
        audio = {"bytes": file.getvalue(), "path": None}
        rows.append({"audio": audio, "labels": 0, "sample_id": number, "mask_step": 3})
    return rows


def main() -> None:
    rows = clips()
    collate = TASK.collator(TASK.load_processor(CONFIG), CONFIG)
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, NUM_ROWS, BATCH_SIZE)]
    generator = np.random.default_rng(1)

    def keyed() -> None:
        for batch in batches:
            collate(batch)

    def unkeyed() -> None:
        def draw(seed: int, step: int, name: str, ids: list[int], count: int) -> Any:
            return generator.random((len(ids), count))

        def noise(seed: int, step: int, name: str, sample_id: int, count: int) -> Any:
            return generator.standard_normal(count, dtype=np.float32)

        with (
            patch.object(audio_augmentation, "uniform", draw),
            patch.object(audio_augmentation, "normal", noise),
        ):
            keyed()

    def loaded(workers: int) -> float:
        loader = DataLoader(rows, BATCH_SIZE, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]
        return wall_seconds(lambda: list(loader))

    keyed()
    pairs = [(cpu_seconds(keyed), cpu_seconds(unkeyed)) for _ in range(NUM_REPEATS)]
    ours, theirs = (median(column) for column in zip(*pairs, strict=True))
    ratio = median(a / b for a, b in pairs)
    print(f"keyed    {NUM_ROWS / ours:8.0f} clips a CPU second")
    print(f"unkeyed  {NUM_ROWS / theirs:8.0f} clips a CPU second   keyed takes {ratio:.2f}x")
    for workers in (0, 2):
        seconds = median(loaded(workers) for _ in range(3))
        print(f"{workers} workers{NUM_ROWS / seconds:8.0f} clips a second by the wall")


if __name__ == "__main__":
    main()
