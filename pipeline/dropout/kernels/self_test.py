"""What a kernel must draw before it is used: the known answers, and what the reference draws."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.dropout.kernels import reference
from pipeline.dropout.key import signed
from pipeline.dropout.philox import lanes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KNOWN_ANSWERS = (  # of Random123: key, counter, words
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


class Kernel(Protocol):
    """What every kernel offers; per_row are keys, row ids, positions, thresholds and scales.

    They are `[B, M]` for x `[B, M, D]`, `[B, Q]` for x `[B, H, Q, K]`.
    """

    def rows(self, x: Tensor, per_row: tuple[Tensor, ...], group: int) -> Tensor: ...

    def attention(
        self, x: Tensor, per_row: tuple[Tensor, ...], columns: Tensor, head_offset: int
    ) -> Tensor: ...


def self_test(
    kernel: Kernel, device: torch.device | str = "cpu", dtypes: Sequence[torch.dtype] = DTYPES
) -> str:
    """What the kernel gets wrong: known answers, then products in each dtype. Empty if nothing."""
    for key, counter, words in _KNOWN_ANSWERS:
        if not _draws(kernel, device, key, counter, words):
            return f"it does not draw the known answer of Philox4x32-10 for counter {counter}"
    x = torch.linspace(-3, 3, 2 * 3 * 5 * 29).reshape(2, 3, 5, 29)
    ids = torch.tensor([[3], [-2]]).expand(2, 5)
    positions = torch.arange(5).expand(2, 5)
    row = (ids * 7**20, ids, positions, positions * 9999, positions + 0.3)
    columns = torch.stack([torch.arange(29) + 5, (torch.arange(29) - 9).clamp(min=0) * 3])
    moved, moved_columns = tuple(t.to(device) for t in row), columns.to(device)
    for dtype in dtypes:
        y = x.to(dtype)
        masked = kernel.attention(y.to(device), moved, moved_columns, 2).cpu()
        if not masked.equal(reference.attention(y, row, columns, 2)):
            return f"its products in {dtype} differ from the reference"
    for group in (1, 3, 4, 16, 29):
        masked = kernel.rows(x[:, 0].to(device), moved, group).cpu()
        if not masked.equal(reference.rows(x[:, 0], row, group)):
            return f"its masks of {group} neighbouring features differ from the reference"
    return ""


def _draws(
    kernel: Kernel,
    device: torch.device | str,
    key: int,
    counter: tuple[int, ...],
    words: tuple[int, ...],
) -> bool:
    """Whether each lane is kept under its own value as threshold, and dropped under one more."""
    lane_values = lanes(np.array(words, dtype=np.uint32)).astype(np.int64)
    thresholds = torch.from_numpy(np.stack([lane_values, lane_values + 1])).reshape(1, 16)
    row_id = signed(counter[2] | counter[3] << 32)
    row = [torch.tensor(value).expand(1, 16) for value in (signed(key), row_id, counter[1])]
    columns = (counter[0] & 0xFFFFF) * 8 + torch.arange(8)[None]
    per_row = tuple(t.to(device) for t in (*row, thresholds, torch.ones(1, 16)))
    x = torch.ones(1, 1, 16, 8, device=device)
    kept = kernel.attention(x, per_row, columns.to(device), counter[0] >> 20).cpu()
    at_value, above_value = kept.reshape(2, 8, 8).diagonal(dim1=1, dim2=2)
    return bool(at_value.eq(1).all() and above_value.eq(0).all())
