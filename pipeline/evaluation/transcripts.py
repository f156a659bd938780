"""How wrong transcripts are: word and character edits by utterance, and what rejecting some gains.

Edits are jiwer's: substitutions, deletions and insertions of the shortest way from the reference to
the hypothesis (Levenshtein). Sums over utterances add, so that rates of any set follow from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.evaluation.intervals import FloatArray, mean_interval

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Edits:
    """Of N utterances: edits, and words (or characters) of the reference, at least 1; int64 [N]."""

    edits: IntArray
    lengths: IntArray

    @property
    def rate(self) -> float:
        """Edits over reference words: WER (of characters, CER); above 1 where much is inserted."""
        return float(self.edits.sum() / self.lengths.sum())

    def interval(
        self, *, seed: int, num_resamples: int = 1000, confidence_level: float = 0.95
    ) -> tuple[float, float]:
        """Bootstrap interval of the rate, by utterance."""
        return mean_interval(
            self.edits / self.lengths,
            weights=self.lengths,
            seed=seed,
            num_resamples=num_resamples,
            confidence_level=confidence_level,
        )


def word_edits(hypotheses: Sequence[str], references: Sequence[str]) -> Edits:
    """Edits in words, which blanks part."""
    return _edits(hypotheses, references, jiwer.process_words)


def character_edits(hypotheses: Sequence[str], references: Sequence[str]) -> Edits:
    """Edits in characters, blanks inside included."""
    return _edits(hypotheses, references, jiwer.process_characters)


def _edits(hypotheses: Sequence[str], references: Sequence[str], process: object) -> Edits:
    if len(hypotheses) != len(references):
        raise ValueError(
            f"Transcripts are compared in pairs; got {len(hypotheses)} hypotheses and "
            f"{len(references)} references."
        )
    silent = [place for place, text in enumerate(references) if not text.strip()]
    if silent or not references:
        raise ValueError(
            f"An error rate needs a word in every reference; {len(silent)} of {len(references)} "
            f"have none{f', the first is number {silent[0]}' if silent else ''}."
        )
    assert callable(process)
    pairs = [process(r, h) for r, h in zip(references, hypotheses, strict=True)]
    wrong = [one.substitutions + one.deletions for one in pairs]
    edits = [number + one.insertions for number, one in zip(wrong, pairs, strict=True)]
    lengths = [one.hits + number for number, one in zip(wrong, pairs, strict=True)]
    return Edits(np.array(edits, dtype=np.int64), np.array(lengths, dtype=np.int64))


@dataclass(frozen=True)
class RejectionCurve:
    """The error rate of what is kept when the least confident utterances are rejected.

    The risk-coverage curve (El-Yaniv & Wiener, "On the Foundations of Noise-free Selective
    Classification", JMLR 2010) with the error rate as risk. Utterances of equal confidence are kept
    or rejected together. The areas are means over the coverage (trapezoids; the first value holds
    from 0 on): `area` of this confidence, `oracle_area` of one that knows the error rate of each
    utterance; rejecting by lot has the rate of all as its area, on average. Excess area: Geifman,
    Uziel & El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019.
    """

    coverage: FloatArray
    """Share of utterances kept, rising, the last 1; [K]."""
    rate: FloatArray
    """Error rate of those, [K]."""
    area: float
    oracle_area: float

    @property
    def excess_area(self) -> float:
        """Area above the oracle's; 0 is best."""
        return self.area - self.oracle_area


def rejection_curve(edits: Edits, confidence: ArrayLike) -> RejectionCurve:
    """Of utterances with one confidence each, [N]; higher = more certain.

    Raises:
        ValueError: not one finite confidence an utterance.
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    if confidence.shape != edits.edits.shape or not np.isfinite(confidence).all():
        raise ValueError(
            f"One finite confidence an utterance: got shape {confidence.shape} for "
            f"{len(edits.edits)} utterances, {int((~np.isfinite(confidence)).sum())} not finite."
        )
    coverage, rate = _kept(edits, confidence)
    oracle = _kept(edits, -edits.edits / edits.lengths)
    return RejectionCurve(coverage, rate, _area(coverage, rate), _area(*oracle))


def _kept(edits: Edits, confidence: FloatArray) -> tuple[FloatArray, FloatArray]:
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # of each equal run
    wrong, words = edits.edits[order].cumsum()[last], edits.lengths[order].cumsum()[last]
    return (last + 1) / len(ordered), wrong / words


def _area(coverage: FloatArray, rate: FloatArray) -> float:
    return float(np.trapezoid(np.append(rate[:1], rate), np.append(0.0, coverage)))
