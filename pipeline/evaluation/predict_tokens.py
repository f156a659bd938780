"""What a language model says about samples, and about each of the tokens they are made of."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from pipeline.evaluation.forward import PlainPass, on_cpu
from pipeline.evaluation.token_uncertainty import SampleUncertainty, TokenSums, TokenUncertainty


@dataclass(frozen=True)
class TokenPrediction:
    """What a language model says about N samples, and about each of their M predicted tokens."""

    sample_ids: Tensor  # [N] int64
    features: Tensor  # [N, D] float32: mean over the tokens of what the last layer reads
    plain: SampleUncertainty
    monte_carlo: SampleUncertainty
    plain_tokens: TokenUncertainty
    monte_carlo_tokens: TokenUncertainty


def predict_next_tokens(
    batch: dict[str, Tensor], plain: PlainPass, passes: Iterable[Tensor]
) -> TokenPrediction:
    """From the logits [B, L, V] of the plain pass and of each Monte-Carlo pass; each place predicts
    the token behind it."""
    targets = batch["labels"][:, 1:]
    plain_sums, sums = TokenSums(targets), TokenSums(targets)
    plain_sums.update(plain.logits[:, :-1])
    for logits in passes:
        sums.update(logits[:, :-1])
    plain_tokens, tokens = on_cpu(plain_sums.result()), on_cpu(sums.result())
    return TokenPrediction(
        sample_ids=batch["sample_id"].cpu(),
        features=plain.features,
        plain=plain_tokens.per_sample(len(targets)),
        monte_carlo=tokens.per_sample(len(targets)),
        plain_tokens=plain_tokens,
        monte_carlo_tokens=tokens,
    )
