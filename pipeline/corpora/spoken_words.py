"""Spoken words: by espeak-ng where it is installed, else by a small formant synthesiser.

Synthetic either way, and labelled so: enough to see a speech model learn, not to say how well it
would hear people. Formants: Peterson & Barney, "Control methods used in a study of the vowels",
JASA 1952; the cascade of resonators is Klatt's (JASA 1980).
"""

import hashlib
import io
import shutil
import subprocess
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Waveform = NDArray[np.float32]
RATE = 8000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
HELD_OUT = ("eight", "nine", "left", "right")
NUM_SPEAKERS = 12
TAKES = {"train": range(8), "validation": range(8, 10), "test": range(10, 13)}

# Formants in Hz of vowels and vowel-like sounds, for a man; `None`: a noise around so many Hz.
_VOICED = {
    "i": (270, 2290, 3010), "I": (390, 1990, 2550), "E": (530, 1840, 2480), "a": (730, 1090, 2440),
    "V": (640, 1190, 2390), "O": (570, 840, 2410), "u": (300, 870, 2240), "r": (420, 1300, 1600),
    "w": (300, 610, 2200), "n": (280, 1700, 2600), "v": (250, 1100, 2200), "l": (360, 1000, 2600),
    "z": (250, 1500, 2500), "e": (480, 2100, 2700), "o": (500, 900, 2400),
}  # fmt: skip
_NOISE = {"s": 3600, "f": 2600, "T": 3000, "t": 3300, "k": 1900, "z": 3500, "v": 2400}
_SILENCE = {"t": 0.05, "k": 0.05}
_SOUNDS = {
    "zero": "zIro", "one": "wVn", "two": "tu", "three": "Tri", "four": "fOr", "five": "faIv",
    "six": "sIks", "seven": "sEvIn", "eight": "eIt", "nine": "naIn", "left": "lEft",
    "right": "raIt",
}  # fmt: skip


class Speaker(NamedTuple):
    """How someone speaks."""

    name: str
    pitch: float
    """Fundamental frequency in Hz."""
    tract: float
    """Formants relative to those of the table."""
    pace: float
    """Length of sounds, relative."""


def spoken_words() -> "DatasetDict":
    """`audio` (8 kHz, mono), `label`, `transcript`, `speaker`, `voice`; ood: other words, label -1.

    Validation and test hold other takes of the same speakers; speakers 10 and 11 are in test only.
    """
    from datasets import DatasetDict

    splits = {split: _dataset(_utterances(split, WORDS)) for split in TAKES}
    return DatasetDict(**splits, ood=_dataset(_utterances("test", HELD_OUT)))


def voice() -> str:
    """What speaks on this machine."""
    return "espeak-ng" if shutil.which("espeak-ng") else "formant synthesis"


@cache
def speakers() -> tuple[Speaker, ...]:
    """Men, women and children, evenly between low and high."""
    found = []
    for number in range(NUM_SPEAKERS):
        height, pace = _drawn(f"speaker {number}", 2)
        part = (number + height) / NUM_SPEAKERS
        found.append(
            Speaker(f"speaker-{number:02d}", 90 * 3**part, 0.92 + 0.3 * part, 0.85 + 0.3 * pace)
        )
    return tuple(found)


def _utterances(split: str, words: tuple[str, ...]) -> list[tuple[str, Speaker, int]]:
    """Word, speaker, take: in an order that is no word's or speaker's."""
    known = speakers() if split == "test" else speakers()[: NUM_SPEAKERS - 2]
    every = [(word, who, take) for word in words for who in known for take in TAKES[split]]
    return sorted(every, key=lambda row: _drawn(f"{row[0]} {row[1].name} {row[2]}", 1)[0])


def _dataset(rows: list[tuple[str, Speaker, int]]) -> "Dataset":
    from datasets import Audio, ClassLabel, Dataset, Features, Value

    features = Features(
        {
            "audio": {"bytes": Value("binary"), "path": Value("string")},
            "label": ClassLabel(names=list(WORDS)),
            "transcript": Value("string"),
            "speaker": Value("string"),
            "voice": Value("string"),
        }
    )
    columns = {
        "audio": [{"bytes": _wav(_spoken(*row)), "path": None} for row in rows],
        "label": [WORDS.index(word) if word in WORDS else -1 for word, _, _ in rows],
        "transcript": [word for word, _, _ in rows],
        "speaker": [who.name for _, who, _ in rows],
        "voice": [voice()] * len(rows),
    }
    # Cast, not encoded: for that datasets would want torchcodec.
    made = Dataset.from_dict(columns, features=features)
    return made.cast_column("audio", Audio(sampling_rate=RATE, decode=False))


def _spoken(word: str, who: Speaker, take: int) -> Waveform:
    said = _by_espeak if voice() == "espeak-ng" else synthesised
    clip = said(word, who, take)
    hum = _drawn(f"room {word} {who.name} {take}", len(clip)).astype(np.float32) - 0.5
    return clip + 0.01 * hum


# -- the synthesiser -----------------------------------------------------------------------------


def synthesised(word: str, who: Speaker, take: int) -> Waveform:
    """A word sound by sound, [T] float32 at 8 kHz."""
    drift = _drawn(f"take {word} {who.name} {take}", 3) - 0.5
    pitch, pace = who.pitch * (1 + 0.2 * drift[0]), who.pace * (1 + 0.3 * drift[1])
    parts = [np.zeros(int(RATE * 0.05), dtype=np.float32)]
    for place, sound in enumerate(_SOUNDS[word]):
        parts.append(np.zeros(int(RATE * _SILENCE.get(sound, 0)), dtype=np.float32))
        length = int(RATE * pace * (0.13 if sound in _VOICED else 0.09))
        fall = pitch * (1.05 - 0.1 * place / len(_SOUNDS[word]))
        parts.append(_sound(sound, length, fall, who.tract, f"{word} {who.name} {take} {place}"))
    parts.append(np.zeros(int(RATE * 0.05), dtype=np.float32))
    clip = np.concatenate(parts)
    return (clip * (0.5 + 0.2 * drift[2]) / np.abs(clip).max()).astype(np.float32)


def _sound(sound: str, length: int, pitch: float, tract: float, what: str) -> Waveform:
    wave = np.zeros(length)
    if sound in _VOICED:
        pulses = np.diff(np.floor(np.arange(length + 1) * pitch / RATE)) * 1.0
        for formant in _VOICED[sound]:
            pulses = _resonance(pulses, formant * tract, 60 + formant / 20)
        wave += pulses / max(np.abs(pulses).max(), 1e-9)
    if sound in _NOISE:
        hiss = _resonance(_drawn(what, length) - 0.5, min(_NOISE[sound] * tract, 3800), 500)
        wave += 0.5 * hiss / max(np.abs(hiss).max(), 1e-9)
    edge = np.minimum(1, np.minimum(np.arange(length), np.arange(length)[::-1]) / (0.015 * RATE))
    return (wave * edge).astype(np.float32)


def _resonance(wave: NDArray[np.float64], frequency: float, width: float) -> NDArray[np.float64]:
    """A resonator of the second order at a frequency, both in Hz."""
    from scipy.signal import lfilter

    radius = np.exp(-np.pi * width / RATE)
    poles = [1, -2 * radius * np.cos(2 * np.pi * frequency / RATE), radius**2]
    return np.asarray(lfilter([sum(poles)], poles, wave))


def _by_espeak(word: str, who: Speaker, take: int) -> Waveform:
    """The same speakers as espeak-ng can make them."""
    import soundfile

    from pipeline.modality.sounds import resampled

    drift = _drawn(f"take {word} {who.name} {take}", 2) - 0.5
    part = np.log(who.pitch / 90) / np.log(3)
    options = [
        f"-ven+{'f' if part > 0.5 else 'm'}{1 + int(4 * part) % 4}",
        f"-p{int(99 * np.clip(part + 0.2 * drift[0], 0, 1))}",
        f"-s{int(150 / who.pace * (1 + 0.3 * drift[1]))}",
    ]
    spoken = subprocess.run(
        ["espeak-ng", *options, "--stdout", word], capture_output=True, check=True
    ).stdout
    samples, rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
    return resampled(samples, rate, RATE)


def _wav(clip: Waveform) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, clip, RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _drawn(what: str, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) that follow from a text: the same on every machine."""
    data = hashlib.shake_128(what.encode()).digest(4 * count)
    return np.frombuffer(data, dtype="<u4") / 2**32
