"""Semantic entropy: how many different things a model says to one prompt, wordings aside.

Kuhn, Gal & Farquhar, "Semantic Uncertainty", ICLR 2023 (probabilities of the sequences);
Farquhar et al., "Detecting hallucinations in large language models using semantic entropy",
Nature 630, 2024 (the discrete form, which counts). Both take entailment both ways for sameness, as
`entailment.py` does. Equal words find too many meanings; hidden states may find too few.
"""

import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from scipy.stats import entropy

Same = Callable[[int, int], bool]
"""Whether the texts of these two numbers mean the same."""


def clusters(num_texts: int, same: Same) -> list[int]:
    """The cluster of each text: that of the first cluster whose first text means the same."""
    firsts: list[int] = []
    found = []
    for text in range(num_texts):
        place = next((n for n, first in enumerate(firsts) if same(first, text)), len(firsts))
        if place == len(firsts):
            firsts.append(text)
        found.append(place)
    return found


def semantic_entropy(found: Sequence[int]) -> float:
    """Entropy of the share of texts in each cluster, in nats (Farquhar et al., discrete)."""
    return float(entropy(np.bincount(found)))


def weighted_semantic_entropy(found: Sequence[int], log_probabilities: ArrayLike) -> float:
    """Entropy over clusters whose weight is the probability of their texts, in nats (Kuhn et al.).

    Args:
        found: cluster of each text.
        log_probabilities: of each text, length-normalised (as Kuhn et al. do).
    """
    log_p, places = np.asarray(log_probabilities, dtype=np.float64), np.asarray(found)
    return float(entropy([np.exp(logsumexp(log_p[places == c] - log_p.max())) for c in set(found)]))


def normalised(text: str) -> str:
    """Case, punctuation, spaces and Unicode forms aside; punctuation alone stays."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if unicodedata.category(c)[0] not in "PS" else " " for c in folded).split()
    return " ".join(words or folded.split())


def same_words(texts: Sequence[str]) -> Same:
    """Texts that are equal when normalised."""
    plain = [normalised(text) for text in texts]
    return lambda one, other: plain[one] == plain[other]


def same_direction(embeddings: ArrayLike, similarity: float) -> Same:
    """Texts whose embeddings [N, D] have at least this cosine."""
    vectors = np.asarray(embeddings, dtype=np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    cosines = unit @ unit.T
    return lambda one, other: bool(cosines[one, other] >= similarity)
