"""Clips a second of the collator, and what drawing by key costs, for two seconds at 16 kHz.

Run: python benchmarks/audio_collator.py. Unkeyed: the same changes with numbers of numpy's
generator.
"""

import io
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import numpy as np
import soundfile
from _collating import NUM_ROWS, compare

from pipeline.config.schema import RunConfig
from pipeline.modality import audio_augmentation

RATE = 16_000
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


def unkeyed_draws(generator: np.random.Generator) -> AbstractContextManager[Any]:
    def draw(seed: int, step: int, name: str, ids: list[int], count: int) -> Any:
        return generator.random((len(ids), count))

    def noise(seed: int, step: int, name: str, sample_id: int, count: int) -> Any:
        return generator.standard_normal(count, dtype=np.float32)

    return patch.multiple(audio_augmentation, uniform=draw, normal=noise)


if __name__ == "__main__":
    compare(CONFIG, clips(), unkeyed_draws, "clips")
