# mypy: ignore-errors
"""Keyed dropout for GPUs, in Triton: counters, lanes and products as in masks.cpp. gpu.py calls it.

A program masks a tile: some rows of one sample and head, and some blocks of eight neighbouring
columns. A block mostly costs one Philox counter, and in 16-bit formats one 16-byte load.
"""

import triton
import triton.language as tl

MAX_KEY_POSITION = tl.constexpr((1 << 23) - 1)
DONE = tl.constexpr(1 << 20)  # above the counters of all key positions
# How columns find their lanes.
FEATURES = tl.constexpr(0)  # one after the other
GROUPS = tl.constexpr(1)  # a group divides 8 or is a multiple: a block needs one counter
ODD_GROUPS = tl.constexpr(2)
KEY_POSITIONS = tl.constexpr(3)  # by a table, wherever they are


@triton.jit
def _in_order(w0, w1, w2, w3):
    """The eight lanes of each block, one column each: low half first."""
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(words & 0xFFFF, words >> 16)


@triton.jit
def _pick(w0, w1, w2, w3, lane):
    """One lane of four words."""
    front, back = tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3)
    return (tl.where(lane < 4, front, back) >> ((lane % 2) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def _spread(values):
    """A value a block `[R, N]` as one a column `[R, 8 N]`; a broadcast would repeat the work."""
    twice = tl.interleave(values, values)
    four_times = tl.interleave(twice, twice)
    return tl.interleave(four_times, four_times)


@triton.jit
def _from_block(stream_key, counter0, position, id_low, id_high, lane):
    """A block's counter for all of its columns, each with a lane of its own."""
    w0, w1, w2, w3 = tl.philox(stream_key, counter0, position, id_low, id_high)
    return _pick(_spread(w0), _spread(w1), _spread(w2), _spread(w3), lane)


@triton.jit
def _from_anywhere(stream_key, counter0, position, id_low, id_high, lane):
    """A counter for every column."""
    w0, w1, w2, w3 = tl.philox(stream_key, counter0, position, id_low, id_high)
    return _pick(w0, w1, w2, w3, lane)


@triton.jit
def _of_eight(places):
    """Each eight neighbours of `[8 N]`, as eight tensors `[N]`."""
    even, odd = tl.split(tl.reshape(places, [places.shape[0] // 8, 2, 2, 2]))
    p04, p26 = tl.split(even)
    p15, p37 = tl.split(odd)
    p0, p4 = tl.split(p04)
    p1, p5 = tl.split(p15)
    p2, p6 = tl.split(p26)
    p3, p7 = tl.split(p37)
    return p0, p1, p2, p3, p4, p5, p6, p7


@triton.jit
def _lowest(places, above):
    """The lowest counter of each eight that is above the last one."""
    lowest = tl.full(above.shape, DONE, tl.int32)
    for i in tl.static_range(8):
        block = places[i] >> 3
        lowest = tl.where((block > above) & (block < lowest), block, lowest)
    return lowest


@triton.jit
def _pair(words, block, even, odd):
    """A word of the lanes of two neighbours; 0 where a key position has another counter."""
    w0, w1, w2, w3 = words
    low = tl.where((even >> 3) == block, _pick(w0, w1, w2, w3, even & 7), 0)
    high = tl.where((odd >> 3) == block, _pick(w0, w1, w2, w3, odd & 7), 0)
    return low | (high << 16)


@triton.jit
def _at_key_positions(stream_key, head, position, id_low, id_high, places):
    """Lanes of key positions `[8 N]`: a round draws one counter for each eight, the lowest left.

    One round where positions follow each other from a multiple of eight, two where they are shifted
    or begin anew (padding, packed rows), at most eight.
    """
    p = _of_eight(places)
    block = _lowest(p, tl.full([places.shape[0] // 8], -1, tl.int32))
    v0 = tl.zeros([position.shape[0], places.shape[0] // 8], tl.uint32)
    v1, v2, v3 = v0, v0, v0
    while tl.min(block) < DONE:
        words = tl.philox(stream_key, (head | block)[None, :], position, id_low, id_high)
        v0 |= _pair(words, block[None, :], p[0][None, :], p[1][None, :])
        v1 |= _pair(words, block[None, :], p[2][None, :], p[3][None, :])
        v2 |= _pair(words, block[None, :], p[4][None, :], p[5][None, :])
        v3 |= _pair(words, block[None, :], p[6][None, :], p[7][None, :])
        block = _lowest(p, block)
    return _in_order(v0, v1, v2, v3)


@triton.jit(
    do_not_specialize=[
        *("heads", "queries", "group", "head_offset", "key_0", "key_1", "id_0", "id_1"),
        *("position_0", "position_1", "threshold_0", "threshold_1", "scale_0", "scale_1"),
        *("column_0", "column_1"),
    ]
)
def masked(
    x, y, keys, row_ids, positions, thresholds, scales, key_positions,
    x_0, x_1, x_2, y_0, y_1, y_2, columns,
    heads, queries, group, head_offset,
    key_0, key_1, id_0, id_1, position_0, position_1, threshold_0, threshold_1, scale_0, scale_1,
    column_0, column_1,
    LANES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """y = x, masked and scaled. Strides are in elements, those of columns are 1.

    x, y `[samples, heads, queries, columns]`; the five row tensors `[samples, queries]`;
    key_positions `[samples, columns]`.
    """
    COLUMNS: tl.constexpr = BLOCKS * 8
    tile, tiles = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    start, tile = (tile % tiles) * BLOCKS, tile // tiles
    tiles = tl.cdiv(queries, ROWS)
    query, tile = (tile % tiles) * ROWS + tl.arange(0, ROWS), tile // tiles
    head, sample = tile % heads, (tile // heads).to(tl.int64)
    column = start * 8 + tl.arange(0, COLUMNS)
    is_row, is_column, query = query < queries, column < columns, query.to(tl.int64)

    key = tl.load(keys + sample * key_0 + query * key_1, is_row, other=0)[:, None]
    row_id = tl.load(row_ids + sample * id_0 + query * id_1, is_row, other=0)[:, None]
    id_low, id_high = row_id.to(tl.uint32), (row_id >> 32).to(tl.uint32)
    at = tl.load(positions + sample * position_0 + query * position_1, is_row, other=0)
    limit = tl.load(thresholds + sample * threshold_0 + query * threshold_1, is_row, other=0)
    scale = tl.load(scales + sample * scale_0 + query * scale_1, is_row, other=0)[:, None]
    position = at.to(tl.uint32)[:, None]
    is_wrong = (((at >> 32) != 0) | (limit < 0) | (limit > 65536))[:, None]

    if LANES == FEATURES:
        block = (start + tl.arange(0, BLOCKS)).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = tl.philox(key, block, position, id_low, id_high)
        lanes = _in_order(w0, w1, w2, w3)
    elif LANES == GROUPS:
        place = (start + tl.arange(0, BLOCKS)) * 8 // group // 8
        lane = (column // group % 8)[None, :]
        counter0 = place.to(tl.uint32)[None, :]
        lanes = _from_block(key, counter0, position, id_low, id_high, lane)
    elif LANES == ODD_GROUPS:
        place = (column // group)[None, :]
        counter0 = (place // 8).to(tl.uint32)
        lanes = _from_anywhere(key, counter0, position, id_low, id_high, place % 8)
    else:
        place = tl.load(key_positions + sample * column_0 + column.to(tl.int64) * column_1,
                        is_column, other=DONE * 8)  # fmt: skip
        bad = (place < 0) | (place > MAX_KEY_POSITION)
        is_wrong = is_wrong | bad[None, :]
        upper = (head + head_offset) << 20
        place = tl.where(bad, DONE * 8, place).to(tl.int32)
        lanes = _at_key_positions(key, upper, position, id_low, id_high, place)

    is_element = is_row[:, None] & is_column[None, :]
    from_x = x + (sample * x_0 + head.to(tl.int64) * x_1 + query * x_2)[:, None]
    to_y = y + (sample * y_0 + head.to(tl.int64) * y_1 + query * y_2)[:, None]
    value = tl.load(from_x + column[None, :], is_element)
    wide = tl.float64 if value.dtype == tl.float64 else tl.float32
    product = value.to(wide) * scale.to(wide)
    # Chosen, not multiplied: NaN times 0 is not 0.
    kept = tl.where(lanes.to(tl.int32) >= limit.to(tl.int32)[:, None], product, 0.0)
    # To refuse what means nothing the host would have to wait for the device: it is marked instead.
    kept = tl.where(is_wrong, float("nan"), kept)
    tl.store(to_y + column[None, :], kept.to(value.dtype), is_element)
