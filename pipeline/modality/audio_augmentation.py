"""Augmentation of audio, keyed by step and sample: speed, gain, noise at a signal-to-noise ratio.

Speed: Ko et al., "Audio Augmentation for Speech Recognition", Interspeech 2015.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.config.augmentation import AudioAugmentation
from pipeline.modality.draws import normal, uniform

Waveform = NDArray[np.float32]


def augment_clips(
    clips: list[Waveform],
    settings: AudioAugmentation,
    seed: int,
    step: int,
    sample_ids: list[int],
) -> list[Waveform]:
    """Every clip [T] under the draws of its own sample; the clips given stay as they are."""
    numbers = uniform(seed, step, "audio", sample_ids, 3)
    return [
        _augmented(clip, settings, drawn, (seed, step, sample_id))
        for clip, drawn, sample_id in zip(clips, numbers, sample_ids, strict=True)
    ]


def _augmented(
    clip: Waveform,
    settings: AudioAugmentation,
    numbers: NDArray[np.float64],
    coordinates: tuple[int, int, int],
) -> Waveform:
    if settings.speed:
        clip = at_speed(clip, 1 + settings.speed * (2 * numbers[0] - 1))
    if settings.gain_db:
        clip = clip * np.float32(10 ** (settings.gain_db * (2 * numbers[1] - 1) / 20))
    if settings.noise_snr_db is not None:
        low, high = settings.noise_snr_db
        seed, step, sample_id = coordinates
        noise = normal(seed, step, "noise", sample_id, len(clip))
        clip = with_noise(clip, noise, low + numbers[2] * (high - low))
    return clip


def at_speed(clip: Waveform, factor: float) -> Waveform:
    """The clip played `factor` times as fast, by linear interpolation."""
    places = np.arange(0, len(clip) - 1, factor)
    return np.interp(places, np.arange(len(clip)), clip).astype(np.float32)


def with_noise(clip: Waveform, noise: Waveform, snr_db: float) -> Waveform:
    """Noise of unit power added so that 10 log10(power of clip / power of noise) is `snr_db`."""
    power = float(np.mean(np.square(clip, dtype=np.float64)))
    return clip + noise * np.float32(np.sqrt(power / 10 ** (snr_db / 10)))
