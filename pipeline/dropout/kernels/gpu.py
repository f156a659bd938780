"""The Triton kernel for CUDA tensors (masks_triton.py), where Triton is and draws the right masks.

Otherwise the reference serves there too: the same bits, but its masks are drawn on the CPU. Unlike
the others this kernel cannot refuse a bad position or threshold without waiting for the GPU: it
fills the row with NaN.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from pipeline.dropout.kernels import cpu, reference
from pipeline.dropout.kernels.self_test import self_test

_BLOCKS = 128  # of eight columns a program: one a thread of four warps
_MAX = 2**31 - 1  # programs of a launch; columns of a row


class TritonMasks:
    """`rows` and `attention` take what those of the reference take."""

    def __init__(self) -> None:
        from pipeline.dropout.kernels import masks_triton  # only where there is a GPU for it

        self._device_code = masks_triton

    def rows(self, x: Tensor, per_row: tuple[Tensor, ...], group: int) -> Tensor:
        """Mask x `[B, M, D]`."""
        code, num_features = self._device_code, x.shape[2]
        if group >= num_features:
            group = max(8, -(-num_features // 8) * 8)  # the same masks, one counter a block
        if group == 1:
            lanes = code.FEATURES
        else:
            lanes = code.ODD_GROUPS if 8 % group and group % 8 else code.GROUPS
        if num_features > _MAX:
            return reference.rows(x, per_row, group)
        return self._run(x[:, None], per_row, None, (group, 0), lanes)[:, 0]

    def attention(
        self, x: Tensor, per_row: tuple[Tensor, ...], columns: Tensor, head_offset: int
    ) -> Tensor:
        """Mask x `[B, H, Q, K]`."""
        lanes = self._device_code.KEY_POSITIONS
        return self._run(x, per_row, columns.to(x.device), (1, head_offset), lanes)

    def _run(
        self,
        x: Tensor,
        per_row: tuple[Tensor, ...],
        columns: Tensor | None,
        options: tuple[int, int],
        lanes: int,
    ) -> Tensor:
        x, y = _adjacent(x)
        if x.numel() == 0:
            return y
        samples, heads, queries, num_columns = x.shape
        rows, blocks = tile_shape(queries, num_columns)
        tiles = samples * heads * -(-queries // rows) * -(-num_columns // (8 * blocks))
        per_row = tuple(row if row.device == x.device else row.to(x.device) for row in per_row)
        strides = [stride for row in per_row for stride in row.stride()]
        key_positions = x if columns is None else columns  # never read for features
        column_strides = (0, 0) if columns is None else columns.stride()
        with torch.cuda.device_of(x):
            self._device_code.masked[tiles,](
                x, y, *per_row, key_positions, *x.stride()[:3], *y.stride()[:3], num_columns,
                heads, queries, *options, *strides, *column_strides,
                LANES=lanes, ROWS=rows, BLOCKS=blocks, num_warps=max(1, rows * blocks // 32),
            )  # fmt: skip
        return y


def _adjacent(x: Tensor) -> tuple[Tensor, Tensor]:
    """x and a new tensor for the result, columns adjacent in both: as they are, or one copy."""
    y = torch.empty_like(x)
    if x.shape[3] > 1 and (x.stride(3), y.stride(3)) != (1, 1):
        x = x.contiguous()
        y = torch.empty_like(x)
    return x, y


def tile_shape(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Rows and blocks a program takes, powers of two: little beyond the edge, whole warps inside.

    768 features are three times 32 blocks, so 32 and four rows: not 128, of which a quarter idles.
    """
    blocks = -(-num_columns // 8)
    in_tile = min(_BLOCKS, _power_of_two(blocks))
    while in_tile > 32 and blocks % in_tile:
        in_tile //= 2
    return min(_BLOCKS // in_tile, _power_of_two(num_rows)), in_tile


def _power_of_two(number: int) -> int:
    """The next one, not below the number."""
    return 1 << max(number - 1, 0).bit_length()


@cache
def kernel(device: torch.device) -> TritonMasks | None:
    """The kernel for this device, if Triton is installed and draws the right masks on it."""
    if cpu.wish() == "numpy":
        return None
    try:
        loaded = TritonMasks()
        trouble = self_test(loaded, device)
    except Exception as error:  # what a missing compiler or an old card raises is Triton's business
        trouble = f"{type(error).__name__}: {error}"
    if not trouble:
        return loaded
    warnings.warn(
        f"The Triton dropout kernel is not used on {device}, the reference serves instead (the "
        f"same masks, much slower): {trouble}. Install the Triton that this torch asks for.",
        stacklevel=2,
    )
    return None
