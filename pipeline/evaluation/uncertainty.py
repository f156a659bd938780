"""Uncertainty of a classifier from Monte-Carlo dropout passes, as streaming sums.

Nothing of size [T, N, C] is ever kept: memory is that of one pass. Shapes: N rows, C classes, T
passes. Entropies are in nats. For language models see `token_uncertainty.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.errors import ModelError

Rows = TypeVar("Rows")


@dataclass(frozen=True)
class Uncertainty:
    """What T passes say about N rows; float64 unless noted.

    With p_t the class probabilities of pass t, and p = mean_t p_t:

        predictive entropy  H[p]                        total uncertainty
        expected entropy    mean_t H[p_t]               aleatoric: noise in the data
        mutual information  H[p] - mean_t H[p_t]        epistemic: passes that contradict each other
        disagreement        1 - (votes of the mode) / T the variation ratio

    Gal & Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016; mutual information as
    "BALD", Houlsby et al. 2011; variation ratio, Freeman 1965 (Gal's thesis, section 3.3.1, has
    all four).
    """

    mean_probabilities: Tensor  # [N, C]
    prediction: Tensor  # [N] int64: the class of the largest mean probability
    confidence: Tensor  # [N] that probability
    predictive_entropy: Tensor  # [N]
    expected_entropy: Tensor  # [N]
    mutual_information: Tensor  # [N]
    disagreement: Tensor  # [N]


class MonteCarloSums:
    """Sums over passes in float64: `update` once a pass (or a stack of passes), then `result`."""

    def __init__(self) -> None:
        self.num_passes = 0
        self._probabilities = torch.empty(0)
        self._entropies = torch.empty(0)
        self._votes = torch.empty(0)

    def update(self, logits: Tensor) -> None:
        """Add one pass [N, C], or stacked passes [T, N, C], of logits or log-probabilities.

        Stacked passes are added in order, so a stack gives the very bits of its passes one by one.
        """
        if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
            raise ValueError(
                f"A pass has shape [N, C], stacked passes [T, N, C]; got {list(logits.shape)}."
            )
        for one_pass in logits if logits.dim() == 3 else [logits]:
            self._add(one_pass.detach())

    def result(self) -> Uncertainty:
        """The uncertainty after the passes added so far; more may be added afterwards."""
        if self.num_passes == 0:
            raise ValueError("No pass was added; call update before result.")
        mean_NC = self._probabilities / self.num_passes
        predictive = entropy(mean_NC)
        expected = self._entropies / self.num_passes
        confidence, prediction = mean_NC.max(dim=-1)
        mode_votes = self._votes.amax(dim=-1).double()
        return Uncertainty(
            mean_probabilities=mean_NC,
            prediction=prediction,
            confidence=confidence,
            predictive_entropy=predictive,
            expected_entropy=expected,
            mutual_information=non_negative(predictive - expected, tolerance=1e-9),
            disagreement=1 - mode_votes / self.num_passes,
        )

    def _add(self, logits_NC: Tensor) -> None:
        probabilities_NC = logits_NC.double().softmax(dim=-1)
        refuse_nan(probabilities_NC, self.num_passes)
        if self.num_passes == 0:
            self._probabilities = torch.zeros_like(probabilities_NC)
            self._entropies = probabilities_NC.new_zeros(len(probabilities_NC))
            self._votes = torch.zeros_like(probabilities_NC, dtype=torch.int32)
        elif logits_NC.shape != self._votes.shape:
            raise ValueError(
                f"Pass {self.num_passes} has shape {list(logits_NC.shape)}, the passes before it "
                f"{list(self._votes.shape)}; all passes must see the same rows."
            )
        self._probabilities += probabilities_NC
        self._entropies += entropy(probabilities_NC)
        winner = probabilities_NC.argmax(dim=-1, keepdim=True)
        self._votes.scatter_add_(1, winner, torch.ones_like(winner, dtype=torch.int32))
        self.num_passes += 1


def entropy(probabilities: Tensor) -> Tensor:
    """-sum_c p_c log p_c over the last dimension, in nats, with 0 log 0 = 0."""
    return torch.special.entr(probabilities).sum(dim=-1)


def non_negative(mutual_information: Tensor, tolerance: float) -> Tensor:
    """By Jensen's inequality >= 0: below by rounding becomes 0, by more is our own mistake."""
    lowest = mutual_information.min().item() if mutual_information.numel() else 0.0
    assert lowest >= -tolerance, f"mutual information {lowest} is below 0 by more than rounding"
    return mutual_information.clamp(min=0)


def refuse_nan(probabilities: Tensor, pass_number: int) -> None:
    """A NaN or infinite logit makes every later mean meaningless: say where it is."""
    broken = probabilities.isnan().any(dim=-1).nonzero().flatten().tolist()
    if broken:
        raise ModelError(
            f"Monte-Carlo pass {pass_number} gave NaN or infinite logits for {len(broken)} of "
            f"{len(probabilities)} rows (the first is row {broken[0]} of its batch). "
            "Check that training converged; in fp16 try bf16 or float32."
        )


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Results of consecutive batches as one; every field is joined along its first dimension."""
    if not parts:
        raise ValueError("There are no batches to join; at least one is needed.")
    joined = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in fields(parts[0])  # type: ignore[arg-type]
    }
    return type(parts[0])(**joined)
