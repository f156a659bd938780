"""Minimum Bayes risk: of sampled texts, the one that all of them are most like.

Kumar & Byrne, "Minimum Bayes-Risk Decoding for Statistical Machine Translation", NAACL 2004; over
samples: Eikema & Aziz, EMNLP 2022. Utilities: chrF (Popović, WMT 2015, by sacrebleu), token F1
(SQuAD's, over normalised words).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.evaluation.semantic import normalised

Utility = Callable[[str, str], float]
"""(text, reference) -> how alike they are, 0 to 1."""


def chrf(text: str, reference: str) -> float:
    """Character n-gram F-score, n up to 6, beta 2; 1 for two empty texts."""
    if not text.strip() or not reference.strip():
        return float(text.strip() == reference.strip())
    return float(_chrf().sentence_score(text, [reference]).score) / 100


def token_f1(text: str, reference: str) -> float:
    """Balance of precision and recall over words."""
    said, wanted = normalised(text).split(), normalised(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


UTILITIES: dict[str, Utility] = {"chrf": chrf, "token_f1": token_f1}


def least_risk(texts: Sequence[str], utility: Utility) -> int:
    """Number of the text of the largest mean utility, each text a reference; ties: the first."""
    gains = [np.mean([utility(text, reference) for reference in texts]) for text in texts]
    return int(np.argmax(gains))


@lru_cache(maxsize=1)
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
