"""Uncertainty of a language model from Monte-Carlo dropout passes: by token, then by sample.

The largest thing kept is one [tokens, V] sum for the valid tokens of one batch. V is the
vocabulary. One pass alone gives the deterministic figures (mutual information is then 0).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluation.uncertainty import entropy, non_negative, refuse_nan

IGNORED = -100
_CHUNK_ELEMENTS = 2**22  # float64 temporaries stay below 32 MiB each


@dataclass(frozen=True)
class SampleUncertainty:
    """Means over the valid tokens of each of B samples, nats a token; NaN where there is none."""

    num_tokens: Tensor  # [B] int64
    log_probability: Tensor  # [B] mean of log(mean_t p_t(target))
    expected_log_probability: Tensor  # [B] mean of mean_t log p_t(target)
    predictive_entropy: Tensor  # [B]
    expected_entropy: Tensor  # [B]
    mutual_information: Tensor  # [B]

    @property
    def perplexity(self) -> Tensor:
        """exp(-mean token log-probability), [B]."""
        return (-self.log_probability).exp()


@dataclass(frozen=True)
class TokenUncertainty:
    """What T passes say about the M valid tokens of a batch; float64 unless noted.

    The entropies are those of `Uncertainty`, with the vocabulary as classes (for sequences:
    Malinin & Gales, "Uncertainty Estimation in Autoregressive Structured Prediction", ICLR 2021).
    """

    row: Tensor  # [M] int64: the token's row in the batch
    log_probability: Tensor  # [M] log(mean_t p_t(target))
    expected_log_probability: Tensor  # [M] mean_t log p_t(target)
    predictive_entropy: Tensor  # [M]
    expected_entropy: Tensor  # [M]
    mutual_information: Tensor  # [M]
    confidence: Tensor  # [M] largest mean probability
    correct: Tensor  # [M] bool: the target has it
    squared_error: Tensor  # [M] sum_v (p_v - [v = target])^2, the token's Brier score

    def per_sample(self, num_samples: int) -> SampleUncertainty:
        """The mean of each figure over the valid tokens of each row of the batch."""
        count = torch.bincount(self.row, minlength=num_samples)

        def mean(values: Tensor) -> Tensor:
            return values.new_zeros(num_samples).index_add_(0, self.row, values) / count

        return SampleUncertainty(
            num_tokens=count,
            log_probability=mean(self.log_probability),
            expected_log_probability=mean(self.expected_log_probability),
            predictive_entropy=mean(self.predictive_entropy),
            expected_entropy=mean(self.expected_entropy),
            mutual_information=mean(self.mutual_information),
        )


class TokenSums:
    """Sums over passes for one batch of token targets: `update` once a pass, then `result`.

    Args:
        targets: [B, L] int64; `targets[b, l]` is the token that `logits[b, l]` predicts (that is,
            already shifted), -100 where nothing is counted.
        dtype: of the [tokens, V] sum of probabilities. float32 halves the memory; entropies then
            carry errors of about 1e-6 nats.
    """

    def __init__(self, targets: Tensor, dtype: torch.dtype = torch.float64) -> None:
        if targets.dim() != 2:
            raise ValueError(f"Token targets have shape [B, L]; got {list(targets.shape)}.")
        self.num_passes = 0
        self._valid = targets != IGNORED
        self._row = self._valid.nonzero()[:, 0]
        self._target = targets[self._valid]
        self._dtype = dtype
        zeros = torch.zeros(len(self._target), dtype=torch.float64, device=targets.device)
        self._probabilities = torch.empty(0)
        self._entropies, self._log_probabilities = zeros, zeros.clone()
        self._log_sum = torch.full_like(zeros, -torch.inf)

    def update(self, logits: Tensor) -> None:
        """Add one pass of logits or log-probabilities, [B, L, V]."""
        if logits.dim() != 3 or logits.shape[:2] != self._valid.shape:
            raise ValueError(
                f"The targets have shape {list(self._valid.shape)}, so a pass has "
                f"{[*self._valid.shape, 'V']}; got {list(logits.shape)}."
            )
        logits_MV = logits.detach()[self._valid]
        if self.num_passes == 0:
            self._probabilities = torch.zeros_like(logits_MV, dtype=self._dtype)
        for part in self._chunks(logits_MV.shape[1]):
            self._add(part, logits_MV[part])
        self.num_passes += 1

    def mean_probabilities(self) -> Tensor:
        """[M, V], for a calibration that needs whole distributions; it is large."""
        return self._probabilities / self._passes()

    def result(self) -> TokenUncertainty:
        """The uncertainty of every valid token after the passes added so far."""
        num_passes = self._passes()
        predictive, confidence, squared_error, correct = self._distribution_figures(num_passes)
        expected = self._entropies / num_passes
        tolerance = 1e-9 if self._dtype == torch.float64 else 1e-3
        return TokenUncertainty(
            row=self._row,
            log_probability=self._log_sum - math.log(num_passes),
            expected_log_probability=self._log_probabilities / num_passes,
            predictive_entropy=predictive,
            expected_entropy=expected,
            mutual_information=non_negative(predictive - expected, tolerance),
            confidence=confidence,
            correct=correct,
            squared_error=squared_error,
        )

    def _add(self, part: slice, logits_MV: Tensor) -> None:
        log_MV = logits_MV.double().log_softmax(dim=-1)
        probabilities_MV = log_MV.exp()
        refuse_nan(probabilities_MV, self.num_passes)
        target = log_MV.gather(1, self._target[part, None]).squeeze(1)
        self._probabilities[part] += probabilities_MV.to(self._dtype)
        self._entropies[part] += entropy(probabilities_MV)
        self._log_probabilities[part] += target
        self._log_sum[part] = torch.logaddexp(self._log_sum[part], target)

    def _distribution_figures(self, num_passes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predictive entropy, confidence, squared error and correctness of the mean, in chunks."""
        figures = [torch.empty_like(self._entropies) for _ in range(3)]
        correct = torch.empty_like(self._target, dtype=torch.bool)
        for part in self._chunks(self._probabilities.shape[1]):
            mean_MV = self._probabilities[part].double() / num_passes
            target = mean_MV.gather(1, self._target[part, None]).squeeze(1)
            figures[0][part] = entropy(mean_MV)
            figures[1][part], prediction = mean_MV.max(dim=-1)
            figures[2][part] = mean_MV.square().sum(dim=-1) - 2 * target + 1
            correct[part] = prediction == self._target[part]
        return figures[0], figures[1], figures[2], correct

    def _chunks(self, vocabulary: int) -> Iterator[slice]:
        rows = max(1, _CHUNK_ELEMENTS // vocabulary)
        for start in range(0, len(self._target), rows):
            yield slice(start, start + rows)

    def _passes(self) -> int:
        if self.num_passes == 0:
            raise ValueError("No pass was added; call update before result.")
        return self.num_passes
