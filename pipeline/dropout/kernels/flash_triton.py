# mypy: ignore-errors
"""Attention with its keyed dropout for GPUs, in Triton: the probabilities never reach memory.

FlashAttention-2 (Dao 2023), with the mask of masks_triton.py drawn tile by tile, again in backward.
O = (P * keep * s) V / sum(P), so dP = keep * s * (dO V^T), and its row sum with P is sum(dO * O).
flash.py calls it.
"""

import triton
import triton.language as tl

from pipeline.dropout.kernels.masks_triton import DONE, MAX_KEY_POSITION, _at_key_positions


@triton.jit
def _row_coordinates(rows, strides, sample, query, is_row):
    """Key, threshold, scale, position and the halves of the row id, each `[R, 1]`."""
    keys, row_ids, positions, thresholds, scales = rows
    k0, k1, i0, i1, p0, p1, t0, t1, s0, s1 = strides
    key = tl.load(keys + sample * k0 + query * k1, is_row, other=0)[:, None]
    row_id = tl.load(row_ids + sample * i0 + query * i1, is_row, other=0)[:, None]
    at = tl.load(positions + sample * p0 + query * p1, is_row, other=0)[:, None]
    limit = tl.load(thresholds + sample * t0 + query * t1, is_row, other=0)[:, None]
    scale = tl.load(scales + sample * s0 + query * s1, is_row, other=0)[:, None]
    is_wrong = ((at >> 32) != 0) | (limit < 0) | (limit > 65536)
    scale = tl.where(is_wrong, float("nan"), scale.to(tl.float32))
    limit = tl.where(is_wrong, 0, limit).to(tl.int32)
    return key, limit, scale, at.to(tl.uint32), row_id.to(tl.uint32), (row_id >> 32).to(tl.uint32)


@triton.jit
def _factor(coordinates, upper, key_positions, column, is_column):
    """What the mask multiplies a tile of probabilities by: the scale, or 0."""
    key, limit, scale, position, id_low, id_high = coordinates
    place = tl.load(key_positions + column, is_column, other=DONE * 8)
    is_bad = (place < 0) | (place > MAX_KEY_POSITION)
    place = tl.where(is_bad, DONE * 8, place).to(tl.int32)
    lanes = _at_key_positions(key, upper, position, id_low, id_high, place)
    factor = tl.where(lanes.to(tl.int32) >= limit, scale, 0.0)
    return tl.where((is_bad & is_column)[None, :], float("nan"), factor)


@triton.jit
def _tile(base, row, row_stride, feature, is_row, width):
    """Rows `[R, D]` of a matrix whose features are adjacent."""
    inside = is_row[:, None] & (feature < width)[None, :]
    return tl.load(base + row[:, None] * row_stride + feature[None, :], inside, other=0.0)


@triton.jit
def _put(base, row, row_stride, feature, is_row, width, value):
    inside = is_row[:, None] & (feature < width)[None, :]
    tl.store(base + row[:, None] * row_stride + feature[None, :],
             value.to(base.dtype.element_ty), inside)  # fmt: skip


@triton.jit
def _scores(q, k, scaling, mask, m2, query, column, is_row, is_column, HAS_MASK: tl.constexpr):
    """Scores of a tile, `-inf` outside."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    inside = is_row[:, None] & is_column[None, :]
    if HAS_MASK:
        at = mask + query[:, None] * m2 + column[None, :]
        s += tl.load(at, inside, other=0.0).to(tl.float32)
    return tl.where(is_column[None, :], s, float("-inf"))


@triton.jit
def forward(
    q, k, v, mask, out, softmax, keys, row_ids, positions, thresholds, scales, key_positions,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, m0, m1, m2, o0, o1, o2,
    a0, a1, b0, b1, c0, c1, d0, d1, e0, e1, columns_0,
    heads, repeats, num_queries, num_keys, width, value_width, head_offset, scaling,
    HAS_MASK: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """q, k `[B, H, N, D]`, v `[B, H, N, E]`, out as q's rows; a program for Q queries of a head."""
    tile, tiles = tl.program_id(0), tl.cdiv(num_queries, Q)
    query = (tile % tiles) * Q + tl.arange(0, Q)
    head, sample = (tile // tiles) % heads, (tile // tiles // heads).to(tl.int64)
    is_row, query = query < num_queries, query.to(tl.int64)
    feature, output = tl.arange(0, D), tl.arange(0, E)
    rows, strides = (keys, row_ids, positions, thresholds, scales), (a0, a1, b0, b1, c0, c1, d0, d1, e0, e1)  # fmt: skip # noqa: E501
    coordinates = _row_coordinates(rows, strides, sample, query, is_row)
    upper, kv_head = (head + head_offset) << 20, (head // repeats).to(tl.int64)
    head = head.to(tl.int64)
    q_tile = _tile(q + sample * q0 + head * q1, query, q2, feature, is_row, width)
    top = tl.full([Q], float("-inf"), tl.float32)
    total = tl.zeros([Q], tl.float32)
    result = tl.zeros([Q, E], tl.float32)
    for start in range(0, num_keys, K):
        column = (start + tl.arange(0, K)).to(tl.int64)
        is_column = column < num_keys
        k_tile = _tile(k + sample * k0 + kv_head * k1, column, k2, feature, is_column, width)
        v_tile = _tile(v + sample * v0 + kv_head * v1, column, v2, output, is_column, value_width)
        s = _scores(q_tile, k_tile, scaling, mask + sample * m0 + head * m1, m2, query, column,
                    is_row, is_column, HAS_MASK)  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p, shrink = tl.exp(s - base[:, None]), tl.exp(top - base)
        total = total * shrink + tl.sum(p, 1)
        factor = _factor(coordinates, upper, key_positions + sample * columns_0, column, is_column)
        kept = (p * factor).to(v_tile.dtype)
        result = result * shrink[:, None] + tl.dot(kept, v_tile, input_precision="ieee")
        top = higher
    _put(out + sample * o0 + head * o1, query, o2, output, is_row, value_width,
         result / total[:, None])  # fmt: skip
    # Apart, not as their logarithm: beside the least number of a row that sees nothing it would
    # vanish.
    at = softmax + ((sample * heads + head) * num_queries + query) * 2
    tl.store(at, top, is_row)
    tl.store(at + 1, total, is_row)


@triton.jit
def backward_queries(
    q, k, v, mask, softmax, dot, gradient, to_q, keys, row_ids, positions, thresholds, scales,
    key_positions,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, m0, m1, m2, g0, g1, g2, y0, y1, y2,
    a0, a1, b0, b1, c0, c1, d0, d1, e0, e1, columns_0,
    heads, repeats, num_queries, num_keys, width, value_width, head_offset, scaling,
    HAS_MASK: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The gradient of Q queries of a head."""
    tile, tiles = tl.program_id(0), tl.cdiv(num_queries, Q)
    query = (tile % tiles) * Q + tl.arange(0, Q)
    head, sample = (tile // tiles) % heads, (tile // tiles // heads).to(tl.int64)
    is_row, query = query < num_queries, query.to(tl.int64)
    feature, output = tl.arange(0, D), tl.arange(0, E)
    rows, strides = (keys, row_ids, positions, thresholds, scales), (a0, a1, b0, b1, c0, c1, d0, d1, e0, e1)  # fmt: skip # noqa: E501
    coordinates = _row_coordinates(rows, strides, sample, query, is_row)
    upper, kv_head = (head + head_offset) << 20, (head // repeats).to(tl.int64)
    head = head.to(tl.int64)
    q_tile = _tile(q + sample * q0 + head * q1, query, q2, feature, is_row, width)
    g_tile = _tile(gradient + sample * g0 + head * g1, query, g2, output, is_row, value_width)
    at = (sample * heads + head) * num_queries + query
    top = tl.load(softmax + at * 2, is_row, other=0.0)[:, None]
    total = tl.load(softmax + at * 2 + 1, is_row, other=1.0)[:, None]
    inner = tl.load(dot + at, is_row, other=0.0)[:, None]
    result = tl.zeros([Q, D], tl.float32)
    for start in range(0, num_keys, K):
        column = (start + tl.arange(0, K)).to(tl.int64)
        is_column = column < num_keys
        k_tile = _tile(k + sample * k0 + kv_head * k1, column, k2, feature, is_column, width)
        v_tile = _tile(v + sample * v0 + kv_head * v1, column, v2, output, is_column, value_width)
        s = _scores(q_tile, k_tile, scaling, mask + sample * m0 + head * m1, m2, query, column,
                    is_row, is_column, HAS_MASK)  # fmt: skip
        p = tl.exp(s - top) / total
        factor = _factor(coordinates, upper, key_positions + sample * columns_0, column, is_column)
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee") * factor
        ds = (p * (dp - inner)).to(k_tile.dtype)
        result += tl.dot(ds, k_tile, input_precision="ieee")
    _put(to_q + sample * y0 + head * y1, query, y2, feature, is_row, width, result * scaling)


@triton.jit
def backward_keys(
    q, k, v, mask, softmax, dot, gradient, to_k, to_v, keys, row_ids, positions, thresholds, scales,
    key_positions,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, m0, m1, m2, g0, g1, g2, x0, x1, x2, w0, w1, w2,
    a0, a1, b0, b1, c0, c1, d0, d1, e0, e1, columns_0,
    heads, repeats, num_queries, num_keys, width, value_width, head_offset, scaling,
    HAS_MASK: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The gradients of K keys and values of a head, over all query heads that share it."""
    tile, tiles = tl.program_id(0), tl.cdiv(num_keys, K)
    column = ((tile % tiles) * K + tl.arange(0, K)).to(tl.int64)
    kv_heads = heads // repeats
    kv_head, sample = (tile // tiles) % kv_heads, (tile // tiles // kv_heads).to(tl.int64)
    is_column = column < num_keys
    feature, output = tl.arange(0, D), tl.arange(0, E)
    rows, strides = (keys, row_ids, positions, thresholds, scales), (a0, a1, b0, b1, c0, c1, d0, d1, e0, e1)  # fmt: skip # noqa: E501
    wide_head = kv_head.to(tl.int64)
    k_tile = _tile(k + sample * k0 + wide_head * k1, column, k2, feature, is_column, width)
    v_tile = _tile(v + sample * v0 + wide_head * v1, column, v2, output, is_column, value_width)
    of_k, of_v = tl.zeros([K, D], tl.float32), tl.zeros([K, E], tl.float32)
    for repeat in range(repeats):
        head = kv_head * repeats + repeat
        upper, head = (head + head_offset) << 20, head.to(tl.int64)
        for start in range(0, num_queries, Q):
            query = (start + tl.arange(0, Q)).to(tl.int64)
            is_row = query < num_queries
            coordinates = _row_coordinates(rows, strides, sample, query, is_row)
            q_tile = _tile(q + sample * q0 + head * q1, query, q2, feature, is_row, width)
            g_at = gradient + sample * g0 + head * g1
            g_tile = _tile(g_at, query, g2, output, is_row, value_width)
            at = (sample * heads + head) * num_queries + query
            top = tl.load(softmax + at * 2, is_row, other=float("inf"))[:, None]
            total = tl.load(softmax + at * 2 + 1, is_row, other=1.0)[:, None]
            inner = tl.load(dot + at, is_row, other=0.0)[:, None]
            s = _scores(q_tile, k_tile, scaling, mask + sample * m0 + head * m1, m2, query, column,
                        is_row, is_column, HAS_MASK)  # fmt: skip
            p = tl.exp(s - top) / total
            places = key_positions + sample * columns_0
            factor = _factor(coordinates, upper, places, column, is_column)
            kept = (p * factor).to(g_tile.dtype)
            of_v += tl.dot(tl.trans(kept), g_tile, input_precision="ieee")
            dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee") * factor
            ds = (p * (dp - inner)).to(q_tile.dtype)
            of_k += tl.dot(tl.trans(ds), q_tile, input_precision="ieee")
    _put(to_k + sample * x0 + wide_head * x1, column, x2, feature, is_column, width, of_k * scaling)
    _put(to_v + sample * w0 + wide_head * w1, column, w2, output, is_column, value_width, of_v)
