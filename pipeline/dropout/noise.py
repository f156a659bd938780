"""Uniform noise keyed by sample, position and feature: NEFTune's on embeddings, a router's jitter.

Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", ICLR 2024: uniform(-1, 1)
times alpha / sqrt(L d), L the sample's own number of tokens (transformers takes the padded length,
which changes with the batch). This is augmentation: in training only, never in Monte-Carlo passes.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.dropout.doors import site_names
from pipeline.dropout.masks import ActiveMasks, SiteMask
from pipeline.dropout.philox import NUM_LANES, lanes, philox_words
from pipeline.dropout.plan import DropoutPlan
from pipeline.dropout.sites import SAMPLE_FIRST, Site
from pipeline.errors import DropoutError

NOISE = "noise"
NEFTUNE = "neftune_noise_alpha"
"""The field of `train.extra` that the Trainer must not see: its noise would have no key."""
NOTE = "NEFTune noise is drawn in training only, scaled by each sample's own length."


def with_noise(plan: DropoutPlan, model: nn.Module, alpha: float) -> DropoutPlan:
    """The plan with noise on the model's token embeddings; the site's rate is alpha.

    Raises:
        DropoutError: this model's embeddings cannot be keyed.
    """
    name = site_names(model).get(model.get_input_embeddings())  # type: ignore[operator]
    if name is None or getattr(model.config, "is_encoder_decoder", False):
        raise DropoutError(
            f"train.extra.neftune_noise_alpha is {alpha:g}, but {type(model).__name__} embeds the "
            "tokens of encoder and decoder by one table, and the noise cannot tell them apart. "
            "Leave it out."
        )
    site = Site(
        site=name,
        call=0,
        door=NOISE,
        role=NOISE,
        variant=NOISE,
        rate=float(alpha),
        in_force=alpha > 0,
        reason="" if alpha > 0 else "alpha 0",
        layout=SAMPLE_FIRST,
        shape=(),
    )
    notes = (*plan.notes, NOTE) if alpha > 0 else plan.notes
    return replace(plan, sites=(site, *plan.sites), notes=notes)


class NoiseMask(SiteMask):
    """The planned noise: not a mask that drops, but drawn by the same coordinates."""

    def __init__(self, site: Site, stacks: tuple[str, ...]) -> None:
        super().__init__(replace(site, rate=0.0, shape=(1, 1)), stacks)
        self.site, self.alpha = site, site.rate

    def apply(self, active: ActiveMasks, key: Tensor, x: Tensor) -> Tensor:
        """Add noise to embeddings `[B, T, D]`."""
        T, D = x.shape[1:]
        positions = self._positions(active, T, x.device).expand(len(x), T)
        ids = active.row_ids.view(len(x), -1).expand(len(x), T)
        noise = uniform_noise(key[:, None].expand(len(x), T), positions, ids, D)
        size = self.alpha / torch.sqrt(self._lengths(active, x).double() * D)
        return x + (noise.to(x.device) * size[..., None].to(x.device)).to(x.dtype)

    def _lengths(self, active: ActiveMasks, x: Tensor) -> Tensor:
        """Number of tokens of each row's sample, `[B, 1]`, or of each token's, `[B, T]`."""
        if active.row_ids.dim() == 2:
            ids = active.row_ids
            return (ids[:, :, None] == ids[:, None, :]).sum(-1)
        attended = self.attended(active)
        if attended is None:
            return torch.full((len(x), 1), x.shape[1])
        return attended.sum(-1, keepdim=True).clamp(min=1)


class JitterMask(SiteMask):
    """The planned jitter: not a mask that drops, but drawn by the same coordinates."""

    def __init__(self, site: Site, stacks: tuple[str, ...]) -> None:
        super().__init__(replace(site, rate=0.0, shape=(1, 1)), stacks)
        self.site = site

    def apply(self, active: ActiveMasks, key: Tensor, x: Tensor) -> Tensor:
        """Multiply tokens `[B, T, D]` or `[B x T, D]` in place, as the models do.

        In place on purpose: some hand the same tensor to their experts.
        """
        B, D = active.row_ids.shape[0], x.shape[-1]
        T = x.numel() // (B * D)
        positions = self._positions(active, T, x.device).expand(B, T)
        ids = active.row_ids.view(B, -1).expand(B, T)
        noise = uniform_noise(key[:, None].expand(B, T), positions, ids, D)
        return x.mul_((1 + self.site.rate * noise).to(x).view(x.shape))


def uniform_noise(keys: Tensor, positions: Tensor, row_ids: Tensor, num_features: int) -> Tensor:
    """Numbers in (-1, 1), `[B, T, D]`, float64: feature d has lane d % 8 of (d // 8, position)."""
    key, position, row = (
        part.detach().cpu().numpy().astype(np.int64).view(np.uint64)[..., None]
        for part in (keys, positions, row_ids)
    )
    words = philox_words(key, np.arange(-(-num_features // 8)), position, row)
    drawn = lanes(words).reshape(*keys.shape, -1)[..., :num_features]
    return torch.from_numpy((2.0 * drawn + 1) / NUM_LANES - 1)
