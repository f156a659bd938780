"""Digits, named digits and spoken words: disjoint, the same again, learnable by simple means."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from pipeline.corpora import BUILTIN
from pipeline.corpora.named_digits import WORDS
from pipeline.corpora.spoken_words import HELD_OUT, RATE, speakers, synthesised

NAMES = ("builtin:digits", "builtin:named-digits", "builtin:spoken-words")
FILES = dict(zip(NAMES, ("image", "image", "audio"), strict=True))


@pytest.fixture(scope="module")
def corpora():
    return {name: BUILTIN[name]() for name in NAMES}


def pixels(rows) -> np.ndarray:
    images = [Image.open(io.BytesIO(file["bytes"])) for file in rows["image"]]
    return np.stack([np.asarray(image) for image in images]).reshape(len(images), -1) / 255


def spectra(rows) -> np.ndarray:
    """The loudness of 24 bands in 8 parts of each clip, in decibels."""
    found = []
    for file in rows["audio"]:
        clip = soundfile.read(io.BytesIO(file["bytes"]))[0]
        parts = np.array_split(clip, 8)
        power = [np.abs(np.fft.rfft(part, 512)) ** 2 for part in parts]
        bands = [[band.sum() for band in np.array_split(one, 24)] for one in power]
        found.append(10 * np.log10(np.array(bands).ravel() + 1e-6))
    return np.stack(found)


@pytest.mark.parametrize("name", NAMES)
def test_no_file_stands_in_two_rows_and_reading_again_gives_the_same(corpora, name):
    files = [file["bytes"] for rows in corpora[name].values() for file in rows[FILES[name]]]
    again = [file["bytes"] for rows in BUILTIN[name]().values() for file in rows[FILES[name]]]
    assert len(set(files)) >= 0.99 * len(files)
    assert files == again


def test_digits_can_be_read_by_their_neighbours(corpora):
    train, test = corpora["builtin:digits"]["train"], corpora["builtin:digits"]["test"]
    model = KNeighborsClassifier(3).fit(pixels(train), train["label"])
    assert model.score(pixels(test), test["label"]) > 0.95


def test_photographs_are_no_digits(corpora):
    patches = corpora["builtin:digits"]["ood"]
    assert set(patches["label"]) == {-1}
    assert pixels(patches).std(axis=1).mean() > 0.05


def test_one_name_in_five_is_wrong_and_the_column_says_which(corpora):
    rows = corpora["builtin:named-digits"]["train"]
    named = [WORDS.index(text.split()[-1]) for text in rows["text"]]
    right = [name == label for name, label in zip(named, rows["label"], strict=True)]
    assert right == rows["text_is_right"][:]
    assert 0.75 < np.mean(right) < 0.85


def test_noisy_digits_are_readable_but_not_perfectly(corpora):
    train, test = (corpora["builtin:named-digits"][split] for split in ("train", "test"))
    model = LogisticRegression(C=0.1, max_iter=500).fit(pixels(train), train["label"])
    assert 0.7 < model.score(pixels(test), test["label"]) < 0.97


def test_words_can_be_told_apart_by_their_spectra(corpora):
    train, test = (corpora["builtin:spoken-words"][split] for split in ("train", "test"))
    model = LogisticRegression(max_iter=2000).fit(spectra(train) / 20, train["label"])
    assert model.score(spectra(test) / 20, test["label"]) > 0.9


def test_held_out_words_and_speakers_are_where_they_should_be(corpora):
    spoken = corpora["builtin:spoken-words"]
    assert set(spoken["ood"]["transcript"]) == set(HELD_OUT)
    assert set(spoken["test"]["speaker"]) - set(spoken["train"]["speaker"]) == {
        "speaker-10",
        "speaker-11",
    }


def test_a_voice_has_the_pitch_of_its_speaker():
    for who in speakers()[::4]:
        clip = synthesised("two", who, 0)[int(0.2 * RATE) : int(0.3 * RATE)]
        echo = np.correlate(clip, clip, "full")[len(clip) :]
        shortest = RATE // 400
        period = shortest + echo[shortest : RATE // 70].argmax() + 1
        assert 0.8 < RATE / period / who.pitch < 1.25
