"""Audio that cannot be used is refused with the reason; the rest is one channel at one rate."""

import io

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from pipeline.config.augmentation import AudioAugmentation
from pipeline.modality.audio_augmentation import at_speed, augment_clips, with_noise
from pipeline.modality.draws import normal
from pipeline.modality.quarantine import BadSample
from pipeline.modality.sounds import decode_audio, duration

RATE = 8000
TONE = (0.5 * np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE)).astype(np.float32)


def wav(samples=TONE, rate=RATE, kind="FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=kind)
    return buffer.getvalue()


def test_samples_come_out_as_they_went_in():
    assert np.array_equal(decode_audio({"bytes": wav()}, RATE), TONE)
    assert np.array_equal(decode_audio({"array": TONE, "sampling_rate": RATE}, RATE), TONE)


def test_two_channels_become_their_mean():
    found = decode_audio(wav(np.stack([TONE, np.zeros_like(TONE)], axis=1)), RATE)
    assert np.allclose(found, TONE / 2)


def test_another_rate_is_resampled_as_scipy_does():
    found = decode_audio(wav(), 16_000)
    assert np.allclose(found, resample_poly(TONE, 2, 1), atol=1e-6)
    spectrum = np.abs(np.fft.rfft(found))
    assert abs(spectrum.argmax() * 16_000 / len(found) - 440) < 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"RIFFnothing", "broken audio"),
        (wav()[:30], "broken audio"),
        (wav(np.zeros(0, dtype=np.float32)), "empty"),
        (wav(np.zeros(RATE, dtype=np.float32)), "silent"),
        (wav(TONE[:400]), "0.05 s long, asked for 0.1 to 30 s"),
        (wav(np.tile(TONE, 31)), "31.00 s long"),
        (wav(np.full(RATE, np.nan, dtype=np.float32)), "NaN"),
    ],
    ids=["text", "cut", "empty", "silence", "short", "long", "nan"],
)
def test_what_cannot_be_used_is_refused_with_the_reason(value, reason):
    with pytest.raises(BadSample, match=reason):
        decode_audio(value, RATE, min_seconds=0.1, max_seconds=30)


def test_the_duration_is_that_of_the_header():
    assert duration({"bytes": wav()}) == 1.0
    with pytest.raises(BadSample, match="broken audio"):
        duration({"bytes": b"x"})


def test_noise_has_the_ratio_asked_for():
    noisy = with_noise(TONE, normal(0, 0, "noise", 1, len(TONE)), 10.0)
    ratio = np.mean(TONE**2) / np.mean((noisy - TONE) ** 2)
    assert abs(10 * np.log10(ratio) - 10) < 0.2


def test_twice_the_speed_is_half_as_long_and_twice_as_high():
    fast = at_speed(TONE, 2.0)
    assert abs(len(fast) - len(TONE) / 2) <= 1
    assert abs(np.abs(np.fft.rfft(fast)).argmax() * RATE / len(fast) - 880) < 2


def test_a_clip_sounds_the_same_in_any_batch_and_is_not_written_to():
    settings = AudioAugmentation(noise_snr_db=[5, 20], speed=0.1, gain_db=6)
    clips = [TONE[: 4000 + 100 * i].copy() for i in range(4)]
    before = [clip.copy() for clip in clips]
    whole = augment_clips(clips, settings, 3, 2, [10, 11, 12, 13])
    alone = augment_clips([clips[2]], settings, 3, 2, [12])[0]
    assert np.array_equal(alone, whole[2])
    assert all(np.array_equal(a, b) for a, b in zip(clips, before, strict=True))
