"""Audio as it comes: decoded by soundfile, one channel, at the model's rate; or refused."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.modality.images import encoded
from pipeline.modality.quarantine import BadSample

Waveform = NDArray[np.float32]
SILENCE = 1e-4
"""Peak below which a clip is silent (-80 dB of full scale)."""


def decode_audio(
    value: Any,
    sampling_rate: int | None,
    min_seconds: float = 0.0,
    max_seconds: float | None = None,
) -> Waveform:
    """One clip, [T] float32 in [-1, 1].

    Args:
        value: encoded bytes, or `{"bytes": ..., "path": ...}` as `Audio(decode=False)` gives it; or
            `{"array": ..., "sampling_rate": ...}`.
        sampling_rate: of the result, in Hz; other rates are resampled. None: the clip's own.
        min_seconds, max_seconds: shorter and longer clips are refused.

    Raises:
        BadSample: it is broken, empty, silent, too short or too long.
    """
    samples, rate = _read(value)
    seconds = len(samples) / rate
    if not len(samples):
        raise BadSample("empty: 0 samples")
    if seconds < min_seconds or (max_seconds is not None and seconds > max_seconds):
        most = "" if max_seconds is None else f" to {max_seconds:g}"
        raise BadSample(f"{seconds:.2f} s long, asked for {min_seconds:g}{most} s")
    if not np.isfinite(samples).all():
        raise BadSample("holds NaN or infinite samples")
    if float(np.abs(samples).max()) < SILENCE:
        raise BadSample("silent: no sample above -80 dB")
    return resampled(samples, rate, rate if sampling_rate is None else sampling_rate)


def duration(value: Any) -> float:
    """Seconds of a clip, from its header alone where it has one."""
    if isinstance(value, dict) and value.get("array") is not None:
        return len(value["array"]) / int(value["sampling_rate"])
    import soundfile

    try:
        return float(soundfile.info(io.BytesIO(encoded(value))).duration)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise BadSample(f"broken audio: {error}") from None


def resampled(samples: Waveform, rate: int, wanted: int) -> Waveform:
    """The same sound at another rate: scipy's polyphase filter, [T] float32."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    divisor = np.gcd(rate, wanted)
    return resample_poly(samples, wanted // divisor, rate // divisor).astype(np.float32)


def _read(value: Any) -> tuple[Waveform, int]:
    if isinstance(value, dict) and value.get("array") is not None:
        array, rate = np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
        return (array.mean(axis=-1) if array.ndim == 2 else array), rate
    import soundfile

    try:
        array, rate = soundfile.read(io.BytesIO(encoded(value)), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise BadSample(f"broken audio: {error}") from None
    return array.mean(axis=1), rate
