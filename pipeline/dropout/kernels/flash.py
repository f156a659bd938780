"""Attention and its keyed dropout in one kernel (flash_triton.py), for CUDA tensors.

Asked for by MASKLOCK_KERNEL=flash, until a card has shown it to be faster than probabilities in
memory. Only softmax(q k^T * scaling + mask), masked, times v: no sinks, no softcap.
"""

import warnings
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.dropout import kernels
from pipeline.dropout.kernels import cpu, gpu

_TILE_Q, _TILE_K, _MAX_WIDTH = 64, 64, 256
Tensors = tuple[Tensor, ...]


@cache
def ready(device: torch.device) -> bool:
    """Whether the kernel was asked for, and gives plain attention on this device; tried once."""
    if device.type != "cuda" or cpu.wish() != "flash":
        return False
    if not isinstance(kernels.active(device), gpu.TritonMasks):
        return False
    try:
        trouble = "" if _is_right(device) else "its outputs or gradients are not plain attention's"
    except Exception as error:  # what a missing compiler or an old card raises is Triton's business
        trouble = f"{type(error).__name__}: {error}"
    if trouble:
        warnings.warn(
            f"The fused attention kernel is not used on {device}, eager attention serves instead "
            f"(the same masks, slower): {trouble}. Install the Triton that this torch asks for.",
            stacklevel=2,
        )
    return not trouble


def _is_right(device: torch.device) -> bool:
    row = [torch.arange(4)[None] + n for n in (7**20, 5, 3)]
    shared = (torch.full((1, 4), 20000), torch.full((1, 4), 1.5))
    coordinates: Any = tuple(t.to(device) for t in (*row, torch.arange(40)[None], *shared))
    q, k, v = (torch.linspace(-2, 2, 2 * n * 16).sin().view(1, 2, n, 16) for n in (4, 40, 40))
    q, k, v = (x.to(device).requires_grad_() for x in (q, k, v))
    out = flash_attention(q, k, v, None, coordinates, 0.5)
    plain = kernels.keyed_attention(torch.softmax(q @ k.mT * 0.5, -1), *coordinates) @ v
    found, expected = (
        [x, *torch.autograd.grad(x, (q, k, v), torch.ones_like(x))] for x in (out, plain)
    )
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in pairs)


def serves(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes these tensors (apart from where they are)."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    widths = max(query.shape[-1], value.shape[-1]) <= _MAX_WIDTH
    is_plain = mask is None or (mask.is_floating_point() and not mask.requires_grad)
    is_same = query.dtype == value.dtype and query.dtype in types
    return is_same and widths and is_plain and query.numel() > 0 and value.numel() > 0


def _contiguous(x: Tensor) -> Tensor:
    """Features adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape(query: Tensor, key: Tensor, value: Tensor) -> dict[str, int]:
    """Tile sizes: powers of two, at least what a matrix product takes."""
    power = {n: max(16, 1 << max(t - 1, 0).bit_length()) for n, t in
             {"D": query.shape[-1], "E": value.shape[-1], "Q": query.shape[-2],
              "K": key.shape[-2]}.items()}  # fmt: skip
    narrow = 2 if max(power["D"], power["E"]) > 128 or query.dtype == torch.float32 else 1
    return power | {
        "Q": min(_TILE_Q // narrow, power["Q"]), "K": min(_TILE_K // narrow, power["K"])
    }  # fmt: skip


def _common(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensors, columns: Tensor
) -> tuple[Tensor, Tensors, list[int], list[int], int]:
    """The mask as a tensor, and what all three kernels take."""
    samples, heads, queries, _ = q.shape
    num_keys = k.shape[2]
    added = q if mask is None else _contiguous(mask.expand(samples, heads, queries, num_keys))
    strides = [0, 0, 0] if mask is None else list(added.stride()[:3])
    rows = tuple(row.expand(samples, queries) for row in rows)
    columns = _contiguous(columns.expand(samples, num_keys))
    row_strides = [stride for row in rows for stride in row.stride()]
    return added, (*rows, columns), strides, row_strides, columns.stride(0)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]


@torch.library.custom_op("masklock::flash", mutates_args=())
def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor, row_ids: Tensor,
    positions: Tensor, columns: Tensor, thresholds: Tensor, scales: Tensor, scaling: float,
    head_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from pipeline.dropout.kernels import flash_triton

    q, k, v = _contiguous(q), _contiguous(k), _contiguous(v)
    rows = (keys, row_ids, positions, thresholds, scales)
    added, per_row, of_mask, of_rows, of_columns = _common(q, k, v, mask, rows, columns)
    out, softmax = _empty_outputs(q, v)
    tile = _shape(q, k, v)
    programs = q.shape[0] * q.shape[1] * -(-q.shape[2] // tile["Q"])
    with torch.cuda.device_of(q):
        flash_triton.forward[programs,](
            q, k, v, added, out, softmax, *per_row,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *of_mask,
            *out.stride()[:3], *of_rows, of_columns, *_sizes(q, k, v), head_offset,
            scaling, HAS_MASK=mask is not None, **tile,
        )  # fmt: skip
    return out, softmax


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(*q.shape[:3], 2, dtype=torch.float32)  # maximum and sum


@_flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v)


@torch.library.custom_op("masklock::flash_backward", mutates_args=())
def _flash_backward(
    gradient: Tensor, out: Tensor, softmax: Tensor, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, keys: Tensor, row_ids: Tensor, positions: Tensor, columns: Tensor,
    thresholds: Tensor, scales: Tensor, scaling: float, head_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from pipeline.dropout.kernels import flash_triton

    q, k, v, gradient = (_contiguous(x) for x in (q, k, v, gradient))
    dot = (gradient.float() * out.float()).sum(-1).contiguous()
    rows = (keys, row_ids, positions, thresholds, scales)
    added, per_row, of_mask, of_rows, of_columns = _common(q, k, v, mask, rows, columns)
    to_q, to_k, to_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    tile, last = _shape(q, k, v), (*_sizes(q, k, v), head_offset, scaling)
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *of_mask, *gradient.stride()[:3])
    by_query = q.shape[0] * q.shape[1] * -(-q.shape[2] // tile["Q"])
    by_key = k.shape[0] * k.shape[1] * -(-k.shape[2] // tile["K"])
    with torch.cuda.device_of(q):
        flash_triton.backward_queries[by_query,](
            q, k, v, added, softmax, dot, gradient, to_q, *per_row, *inputs, *to_q.stride()[:3],
            *of_rows, of_columns, *last, HAS_MASK=mask is not None, **tile,
        )  # fmt: skip
        flash_triton.backward_keys[by_key,](
            q, k, v, added, softmax, dot, gradient, to_k, to_v, *per_row, *inputs,
            *to_k.stride()[:3], *to_v.stride()[:3],
            *of_rows, of_columns, *last, HAS_MASK=mask is not None, **tile,
        )  # fmt: skip
    return to_q, to_k, to_v


@_flash_backward.register_fake
def _(
    gradient: Tensor, out: Tensor, softmax: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling, ctx.head_offset = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = _flash_backward(gradient, *ctx.saved_tensors, ctx.scaling, ctx.head_offset)
    return (*found, *(None,) * 9)


_flash.register_autograd(_backward, setup_context=_keep)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    coordinates: Tensors,
    scaling: float,
    head_offset: int = 0,
) -> Tensor:
    """Keyed attention `[B, H, Q, E]` without its probabilities.

    Args:
        query: `[B, H, Q, D]`; key `[B, H / n, K, D]`, value `[B, H / n, K, E]`.
        mask: added to the scores, broadcasting to `[B, H, Q, K]`.
        coordinates: those of `keyed_attention`, in its order.
        scaling: of the scores.
        head_offset: number of the first head.
    """
    out, _ = _flash(query, key, value, mask, *coordinates, float(scaling), head_offset)
    return cast(Tensor, out)
