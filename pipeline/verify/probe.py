"""What a layout's process saw: the order of the rows, and the mask that every site drew for each.

Masks are read as bits over a sample's own tokens, in the order of their positions: padding, batches
and packing leave no trace in them. Gradients are those of a whole step, before clipping.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import parallel
from pipeline.dropout.masks import ActiveMasks, SiteMask
from pipeline.dropout.spectrogram import SpanMask

Digests = dict[str, dict[str, dict[str, str]]]
"""step -> site#call (variant) -> sample id -> digest of the mask's bits."""


@dataclass
class Probe:
    """Collects the draws and gradients of one process."""

    masks: Digests = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    """Draws of the same coordinates that differed, such as a recompute's."""
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def observe(
        self, mask: SiteMask | SpanMask, active: ActiveMasks, key: Tensor, x: Tensor
    ) -> None:
        """A site draws: draw the same mask over ones, and keep a digest for each sample."""
        bits = mask.apply(active, key, torch.ones_like(x, dtype=torch.float32)).detach() > 0
        site = f"{mask.site.site}#{mask.site.call} ({mask.site.variant})"
        seen = self.masks.setdefault(str(active.index), {}).setdefault(site, {})
        if mask.is_shared:  # all samples of a step have this one
            bits = bits.expand(active.row_ids.shape[0], *bits.shape)
        last_too = mask.variant.kernel in ("attention", "spans")
        per_row = bits.reshape(active.row_ids.shape[0], -1, *bits.shape[1:])
        for row, sample, own in samples_in(active.row_ids, mask.attended(active)):
            digest = _digest(_own_tokens(per_row[row], own, last_too))
            if seen.setdefault(str(sample), digest) != digest:
                self.changed.append(f"step {active.index}, {site}, sample {sample}")

    def keep_gradients(self, step: int, model: nn.Module) -> None:
        """Of every trained parameter, whole; under FSDP all processes must call it."""
        kept = self.gradients.setdefault(str(step), {})
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient: Any = parameter.grad.detach()
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                if parallel.is_main():
                    kept[name] = whole.float().cpu().clone()

    def write(self, path: Path) -> None:
        """Draws as JSON, gradients beside them."""
        from safetensors.torch import save_file

        path.write_text(json.dumps({"masks": self.masks, "changed": self.changed}))
        flat = {f"{step}/{n}": g for step, part in self.gradients.items() for n, g in part.items()}
        if flat:
            save_file(flat, path.with_suffix(".safetensors"))


def samples_in(
    row_ids: Tensor, attended: Tensor | None
) -> Iterator[tuple[int, int, Tensor | None]]:
    """Row of the batch, sample id, and which tokens of the row are the sample's (None: all).

    Args:
        row_ids: int64 `[B]`, or `[B, T]` where a row packs several samples, -1 on padding.
        attended: bool `[B, T]`, false on padding.
    """
    for row, ids in enumerate(row_ids):
        if row_ids.dim() == 1:
            yield row, int(ids), None if attended is None else attended[row].bool()
            continue
        for sample in ids[ids >= 0].unique().tolist():
            yield row, sample, ids == sample


def _own_tokens(bits: Tensor, own: Tensor | None, last_too: bool) -> Tensor:
    """Bits of one sample `[m, ..., D]` without those of other tokens of its row.

    Args:
        last_too: whether the last axis has tokens too: keys, or the places of spans.
    """
    if own is None or bits.dim() < 2:
        return bits
    own, length = own.to(bits.device), len(own)
    if not last_too:
        return bits[..., own, :] if bits.shape[-2] == length else bits
    if bits.shape[-1] == length:
        bits = bits[..., own]
    return bits[..., own, :] if bits.shape[-2] == length else bits


def _digest(bits: Tensor) -> str:
    packed = np.packbits(bits.cpu().numpy().ravel())
    return hashlib.blake2b(packed.tobytes(), digest_size=8).hexdigest()
