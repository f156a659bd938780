"""Out-of-distribution scores from Monte-Carlo passes. Higher = more OOD.

Formulas stand in `uncertainty.py`. The entropies serve classifiers (`Uncertainty`) and language
models (`SampleUncertainty`) alike.
"""

from torch import Tensor

from pipeline.evaluation.token_uncertainty import SampleUncertainty
from pipeline.evaluation.uncertainty import Uncertainty

AnyUncertainty = Uncertainty | SampleUncertainty


def mc_msp(passes: Uncertainty) -> Tensor:
    """1 - max_c of the mean probabilities, [N]."""
    return 1 - passes.confidence


def mc_predictive_entropy(passes: AnyUncertainty) -> Tensor:
    """Entropy of the mean distribution, [N]: all of the uncertainty."""
    return passes.predictive_entropy


def mc_expected_entropy(passes: AnyUncertainty) -> Tensor:
    """Mean entropy of the passes, [N]: the part that more data would not remove."""
    return passes.expected_entropy


def mc_mutual_information(passes: AnyUncertainty) -> Tensor:
    """The difference of the two, [N]: the part that comes from not knowing the weights."""
    return passes.mutual_information


def mc_disagreement(passes: Uncertainty) -> Tensor:
    """Share of passes that do not vote for the mode, [N]; takes at most T distinct values."""
    return passes.disagreement


def token_surprise(passes: SampleUncertainty) -> Tensor:
    """-log p of the text, a token on average, [N]: the logarithm of its perplexity."""
    return -passes.log_probability


def token_entropy(passes: SampleUncertainty) -> Tensor:
    """Mean entropy of the next-token distribution, [N]."""
    return passes.predictive_entropy
