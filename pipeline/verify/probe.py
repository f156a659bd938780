"""What a layout's process saw: the order of the rows, and the mask that every site drew for each.

Masks are read as bits over a sample's own tokens, in the order of their positions: padding and
batches leave no trace in them.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.dropout.masks import ActiveMasks, SiteMask
from pipeline.dropout.spectrogram import SpanMask

Digests = dict[str, dict[str, dict[str, str]]]
"""step -> site#call (variant) -> sample id -> digest of the mask's bits."""


@dataclass
class Probe:
    """Collects the draws of one process."""

    masks: Digests = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    """Draws of the same coordinates that differed, such as a recompute's."""

    def observe(
        self, mask: SiteMask | SpanMask, active: ActiveMasks, key: Tensor, x: Tensor
    ) -> None:
        """A site draws: draw the same mask over ones, and keep a digest for each sample."""
        bits = mask.apply(active, key, torch.ones_like(x, dtype=torch.float32)).detach() > 0
        attended = mask.attended(active)
        site = f"{mask.site.site}#{mask.site.call} ({mask.site.variant})"
        seen = self.masks.setdefault(str(active.index), {}).setdefault(site, {})
        if mask.is_shared:  # all samples of a step have this one
            bits = bits.expand(active.row_ids.shape[0], *bits.shape)
        per_sample = bits.reshape(active.row_ids.shape[0], -1, *bits.shape[1:])
        if active.row_ids.dim() == 2:
            own = _of_documents(per_sample, active.row_ids, mask)
        else:
            own = (
                (sample, _own_tokens(per_sample[place], attended, place, mask))
                for place, sample in enumerate(active.row_ids.tolist())
            )
        for sample, tokens in own:
            digest = _digest(tokens)
            if seen.setdefault(str(sample), digest) != digest:
                self.changed.append(f"step {active.index}, {site}, sample {sample}")

    def write(self, path: Path, **facts: Any) -> None:
        """As JSON, with whatever else the process knows."""
        path.write_text(json.dumps({"masks": self.masks, "changed": self.changed, **facts}))


def _of_documents(
    bits: Tensor, row_ids: Tensor, mask: SiteMask | SpanMask
) -> Iterator[tuple[int, Tensor]]:
    """Each document of packed rows, with the bits `[m, ..., D]` that it would have alone."""
    for row, ids in zip(bits, row_ids, strict=True):
        for document in ids[ids >= 0].unique().tolist():
            own = ids == document
            is_attention = mask.variant.kernel == "attention"
            yield document, row[..., own, :][..., own] if is_attention else row[..., own, :]


def _own_tokens(
    bits: Tensor, attended: Tensor | None, place: int, mask: SiteMask | SpanMask
) -> Tensor:
    """Bits of one sample `[m, ..., D]` without those of padding."""
    if attended is None:
        return bits
    own = attended[place].bool()
    if mask.variant.kernel == "attention":
        queries = own[-bits.shape[-2] :] if bits.shape[-2] == len(own) else slice(None)
        keys = own if bits.shape[-1] == len(own) else slice(None)
        return bits[..., queries, :][..., keys]
    return bits[..., own, :] if bits.dim() > 1 and bits.shape[-2] == len(own) else bits


def _digest(bits: Tensor) -> str:
    packed = np.packbits(bits.cpu().numpy().ravel())
    return hashlib.blake2b(packed.tobytes(), digest_size=8).hexdigest()
