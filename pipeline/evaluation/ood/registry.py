"""Every out-of-distribution score by name: one entry in `SCORES` adds one everywhere.

A score reads one *source*, what the passes left for N rows:

    logits              Tensor [N, C]         of the deterministic pass
    monte_carlo         Uncertainty           of T passes of a classifier
    tokens              SampleUncertainty     of the deterministic pass of a language model
    monte_carlo_tokens  SampleUncertainty     of its T passes
    features            Tensor [N, D]         pooled, of the deterministic pass; fitted first
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluation.ood import logits, monte_carlo
from pipeline.evaluation.ood.knn import NearestNeighbours
from pipeline.evaluation.ood.mahalanobis import Mahalanobis

CLASS_SOURCES = {"logits", "monte_carlo", "features"}
TOKEN_SOURCES = {"tokens", "monte_carlo_tokens", "features"}
SOURCES = ("logits", "monte_carlo", "tokens", "monte_carlo_tokens", "features")


class FeatureDetector(Protocol):
    """A score that must see training features first; its input stays untouched.

    `restored(state())` scores as the fitted detector does, to the last bit.
    """

    def fit(self, features: Tensor, labels: Tensor | None = None) -> "FeatureDetector": ...

    def score(self, features: Tensor) -> Tensor: ...

    def state(self) -> dict[str, Tensor]: ...

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> "FeatureDetector": ...


@dataclass(frozen=True)
class Score:
    """A name, what it reads, and how: a function of the source, or a FeatureDetector."""

    name: str
    sources: tuple[str, ...]
    function: Callable[[Any], Tensor] | None = None
    detector: type[Any] | None = None

    @property
    def needs_mc(self) -> bool:
        """Whether it needs Monte-Carlo passes; otherwise one deterministic pass is enough."""
        return self.sources[0].startswith("monte_carlo")


SCORES: dict[str, Score] = {}


def register(score: Score) -> None:
    """Add a score; a name already there is refused."""
    if score.name in SCORES:
        raise ValueError(f"An OOD score named {score.name!r} exists already; choose another name.")
    if not score.sources or not set(score.sources) <= set(SOURCES):
        raise ValueError(f"{score.name} reads {score.sources}; sources are {', '.join(SOURCES)}.")
    if (score.detector is None) == (score.function is None):
        raise ValueError(f"{score.name} needs exactly one of a function and a detector.")
    SCORES[score.name] = score


def fit_detectors(
    features: Tensor, labels: Tensor | None = None, *, num_neighbours: int = 10
) -> dict[str, FeatureDetector]:
    """Every registered detector, fitted to features [N, D] and labels [N] (None: one class)."""
    options: dict[str, dict[str, Any]] = {"knn": {"num_neighbours": num_neighbours}}
    return {
        name: score.detector(**options.get(name, {})).fit(features, labels)
        for name, score in SCORES.items()
        if score.detector is not None
    }


def score_rows(
    sources: Mapping[str, Any],
    detectors: Mapping[str, FeatureDetector] | None = None,
    batches: Sequence[Sequence[int]] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Every registered score that the given sources (and fitted detectors) allow, each [N].

    Args:
        sources: by name, for N rows.
        detectors: fitted, by name.
        batches: places of rows that detectors score together (a matrix product of another height
            may round differently); by default all.
    """
    unknown = set(sources) - set(SOURCES)
    if unknown:
        raise ValueError(f"Unknown sources {sorted(unknown)}; they are {', '.join(SOURCES)}.")
    scored = {}
    for name, score in SCORES.items():
        source = next((source for source in score.sources if source in sources), None)
        detector = (detectors or {}).get(name)
        if source is not None and score.function is not None:
            scored[name] = score.function(sources[source]).cpu().numpy().astype(np.float64)
        elif source is not None and detector is not None:
            scored[name] = _scores(detector, sources[source], batches)
    return scored


def _scores(
    detector: FeatureDetector, features: Tensor, batches: Sequence[Sequence[int]] | None
) -> NDArray[np.float64]:
    scores = np.empty(len(features))
    for places in [range(len(features))] if batches is None else batches:
        scores[list(places)] = detector.score(features[list(places)]).cpu().numpy()
    return scores


_MC, _BOTH = ("monte_carlo",), ("monte_carlo", "monte_carlo_tokens")
for _score in (
    Score("msp", ("logits",), logits.msp),
    Score("max_logit", ("logits",), logits.max_logit),
    Score("energy", ("logits",), logits.energy),
    Score("entropy", ("logits",), logits.entropy),
    Score("surprise", ("tokens",), monte_carlo.token_surprise),
    Score("token_entropy", ("tokens",), monte_carlo.token_entropy),
    Score("mahalanobis", ("features",), detector=Mahalanobis),
    Score("knn", ("features",), detector=NearestNeighbours),
    Score("mc_msp", _MC, monte_carlo.mc_msp),
    Score("mc_surprise", ("monte_carlo_tokens",), monte_carlo.token_surprise),
    Score("mc_predictive_entropy", _BOTH, monte_carlo.mc_predictive_entropy),
    Score("mc_expected_entropy", _BOTH, monte_carlo.mc_expected_entropy),
    Score("mc_mutual_information", _BOTH, monte_carlo.mc_mutual_information),
    Score("mc_disagreement", _MC, monte_carlo.mc_disagreement),
):
    register(_score)
