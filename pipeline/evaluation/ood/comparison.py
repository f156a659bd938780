"""Which score finds one out-of-distribution set best; were Monte-Carlo passes worth it?"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from numpy.typing import ArrayLike

from pipeline.evaluation.intervals import FloatArray, PairedDifference, percentile_interval
from pipeline.evaluation.ood.registry import SCORES
from pipeline.evaluation.ranking import Separation, bootstrap_figures, separation


def compare_scores(
    inside: Mapping[str, ArrayLike],
    outside: Mapping[str, ArrayLike],
    *,
    set_name: str,
    seed: int,
    num_resamples: int = 1000,
    confidence_level: float = 0.95,
) -> dict[str, Any]:
    """The report's section on one set, from name -> scores of the test rows and of the set's rows.

    {"scores": {name: {"auroc", "auroc_interval", "aupr_in", "aupr_out", "fpr95",
    "fpr95_interval"}}, "best", "best_deterministic", "best_mc" (None where there is none),
    "mc_beats_deterministic", "verdict"}. "Best" is by AUROC; the first in the registry's order
    where equal. Monte-Carlo beats the plain pass when the interval of the difference, over the
    same resamples, lies above 0. The two contestants were chosen on these rows, so a narrow win
    deserves a second data set.
    """
    _check(inside, outside, set_name)
    figures = {name: separation(inside[name], outside[name]) for name in inside}
    resampled = bootstrap_figures(inside, outside, seed=seed, num_resamples=num_resamples)
    scores = {name: _entry(figures[name], resampled[name], confidence_level) for name in figures}
    best = max(figures, key=lambda name: figures[name].auroc)
    best_mc = _best(figures, needs_mc=True)
    best_deterministic = _best(figures, needs_mc=False)
    difference, verdict = None, _winner(set_name, best, scores)
    if best_mc and best_deterministic:
        difference = PairedDifference(
            figures[best_mc].auroc - figures[best_deterministic].auroc,
            *percentile_interval(
                resampled[best_mc][0] - resampled[best_deterministic][0], confidence_level
            ),
        )
        verdict += " " + _contest(best_mc, best_deterministic, scores, difference)
    return {
        "scores": scores,
        "best": best,
        "best_deterministic": best_deterministic,
        "best_mc": best_mc,
        "mc_beats_deterministic": difference is not None and difference.outcome == "beats",
        "verdict": verdict,
    }


def _entry(
    figures: Separation, resampled: tuple[FloatArray, FloatArray], confidence_level: float
) -> dict[str, Any]:
    return {
        **asdict(figures),
        "auroc_interval": list(percentile_interval(resampled[0], confidence_level)),
        "fpr95_interval": list(percentile_interval(resampled[1], confidence_level)),
    }


def _best(figures: Mapping[str, Separation], needs_mc: bool) -> str | None:
    names = [name for name in figures if SCORES[name].needs_mc == needs_mc]
    return max(names, key=lambda name: figures[name].auroc, default=None)


def _winner(set_name: str, best: str, scores: Mapping[str, dict[str, Any]]) -> str:
    lower, upper = scores[best]["auroc_interval"]
    return (
        f"{set_name}: {best} separates it best "
        f"(AUROC {scores[best]['auroc']:.3f}, interval {lower:.3f} to {upper:.3f})."
    )


def _contest(
    mc: str, plain: str, scores: Mapping[str, dict[str, Any]], difference: PairedDifference
) -> str:
    relation = {"beats": "beats", "ties": "ties with", "loses": "loses to"}[difference.outcome]
    return (
        f"The best Monte-Carlo score, {mc} ({scores[mc]['auroc']:.3f}), {relation} the best "
        f"single-pass score, {plain} ({scores[plain]['auroc']:.3f}): difference "
        f"{difference.estimate:+.3f}, interval {difference.lower:+.3f} to {difference.upper:+.3f}."
    )


def _check(
    inside: Mapping[str, ArrayLike], outside: Mapping[str, ArrayLike], set_name: str
) -> None:
    if not inside or set(inside) != set(outside):
        raise ValueError(
            f"Both sides of {set_name} need the same scores, at least one; "
            f"got {sorted(inside)} and {sorted(outside)}."
        )
    unknown = sorted(set(inside) - set(SCORES))
    if unknown:
        raise ValueError(f"{unknown} are not registered OOD scores; those are {list(SCORES)}.")
