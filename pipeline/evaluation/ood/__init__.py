"""Out-of-distribution (OOD) scores and their comparison. One contract: higher = more OOD."""

from pipeline.evaluation.ood.comparison import compare_scores
from pipeline.evaluation.ood.registry import (
    SCORES,
    FeatureDetector,
    Score,
    fit_detectors,
    register,
    score_rows,
)

__all__ = [
    "SCORES",
    "FeatureDetector",
    "Score",
    "compare_scores",
    "fit_detectors",
    "register",
    "score_rows",
]
