"""Masked and scaled tensors, by the fastest kernel there is; all kernels give the same bits.

`rows` and `attention` are forward arithmetic only. `keyed_rows` and `keyed_attention` take the same
arguments and have a gradient; for it they keep keys, ids and positions, and draw the mask again.

Row tensors broadcast to `[B, M]` (rows) or `[B, Q]` (attention): keys and row ids as int64 (bits of
a uint64), positions int64 below 2**32, thresholds int32 or int64 in 0 .. 65536, scales float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.dropout.kernels import cpu, gpu, operators, reference
from pipeline.dropout.kernels.self_test import Kernel
from pipeline.errors import DropoutError

MAX_HEADS = 1 << 12
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ROW_TENSORS = ("keys", "row_ids", "positions", "thresholds", "scales")


def active(device: torch.device | str = "cpu") -> Kernel:
    """The kernel that serves this device; each is tested when it is first asked for."""
    kind = device if isinstance(device, str) else device.type
    if kind == "cpu":
        return cpu.library() or reference
    if kind.startswith("cuda"):
        return gpu.kernel(torch.device(device)) or reference
    return reference


def active_kernel(device: torch.device | str = "cpu") -> str:
    """Its name: `cpp (avx512)`, `cpp (avx2)`, `cpp (default)`, `triton` or `numpy`."""
    kernel = active(device)
    if isinstance(kernel, cpu.Library):
        return f"cpp ({kernel.instructions})"
    return "triton" if isinstance(kernel, gpu.TritonMasks) else "numpy"


def rows(
    x: Tensor,
    keys: Tensor,
    row_ids: Tensor,
    positions: Tensor,
    thresholds: Tensor,
    scales: Tensor,
    group: int = 1,
) -> Tensor:
    """Mask x `[B, M, D]` by row; `group` neighbouring features share a decision (>= D: all)."""
    if x.dim() != 3 or group < 1:
        raise DropoutError(
            f"Rows have the shape [samples, positions, features] and a group of at least 1, "
            f"but these have {list(x.shape)} and {group}. Reshape the tensor first."
        )
    per_row = _per_row(x, x.shape[:2], (keys, row_ids, positions, thresholds, scales))
    if x.is_meta:
        return torch.empty_like(x)
    return active(x.device).rows(x, per_row, group)


def attention(
    x: Tensor,
    keys: Tensor,
    row_ids: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    thresholds: Tensor,
    scales: Tensor,
    head_offset: int = 0,
) -> Tensor:
    """Mask attention probabilities x `[B, H, Q, K]`; key_positions broadcast to `[B, K]`."""
    if x.dim() != 4:
        raise DropoutError(
            "Attention probabilities must have the shape [samples, heads, queries, keys], "
            f"but here the shape is {list(x.shape)}. Reshape the tensor first."
        )
    num_samples, num_heads, num_queries, num_keys = x.shape
    if head_offset < 0 or head_offset + num_heads > MAX_HEADS:
        raise DropoutError(
            f"Attention masks are defined for heads 0 to {MAX_HEADS - 1}, but here are heads "
            f"{head_offset} to {head_offset + num_heads - 1}. Switch attention dropout off here."
        )
    row_tensors = (keys, row_ids, query_positions, thresholds, scales)
    per_row = _per_row(x, (num_samples, num_queries), row_tensors)
    columns = _broadcast("key_positions", key_positions, (num_samples, num_keys), x)
    if x.is_meta:
        return torch.empty_like(x)
    return active(x.device).attention(x, per_row, columns, head_offset)


_rows_operator = operators.define("rows", rows)
_attention_operator = operators.define("attention", attention)


def keyed_rows(
    x: Tensor,
    keys: Tensor,
    row_ids: Tensor,
    positions: Tensor,
    thresholds: Tensor,
    scales: Tensor,
    group: int = 1,
) -> Tensor:
    """`rows`, with a gradient of any order."""
    tensors = (keys, row_ids, positions, thresholds, scales)
    if torch.compiler.is_compiling():
        return _rows_operator(x, *tensors, group)
    return _keyed(rows, x, tensors, group)


def keyed_attention(
    x: Tensor,
    keys: Tensor,
    row_ids: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    thresholds: Tensor,
    scales: Tensor,
    head_offset: int = 0,
) -> Tensor:
    """`attention`, with a gradient of any order."""
    tensors = (keys, row_ids, query_positions, key_positions, thresholds, scales)
    if torch.compiler.is_compiling():
        return _attention_operator(x, *tensors, head_offset)
    return _keyed(attention, x, tensors, head_offset)


def _keyed(
    kernel: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor], last: int
) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Keyed.apply(kernel, last, x, *tensors))
    return kernel(x, *tensors, last)


class _Keyed(torch.autograd.Function):
    """A mask is a linear map: its gradient is the same map, applied to the gradient."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Callable[..., Tensor], last: int, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.kernel, ctx.last = kernel, last
        return kernel(x, *tensors, last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        masked = _keyed(ctx.kernel, gradient, tensors, ctx.last)
        return None, None, masked, *(None,) * len(tensors)


def _per_row(x: Tensor, shape: tuple[int, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if x.dtype not in _DTYPES:
        raise DropoutError(
            f"Keyed dropout masks float32, bfloat16, float16 or float64, not {x.dtype}. "
            "Convert it first."
        )
    if all(tensor.shape == shape for tensor in tensors):
        return tensors
    named = zip(_ROW_TENSORS, tensors, strict=True)
    return tuple(_broadcast(name, tensor, shape, x) for name, tensor in named)


def _broadcast(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    try:
        return tensor if tensor.shape == shape else tensor.expand(shape)
    except RuntimeError as error:
        raise DropoutError(
            f"{name} must broadcast to {list(shape)} for a tensor of shape {list(x.shape)}, "
            f"but have the shape {list(tensor.shape)}. Give one value a row."
        ) from error
