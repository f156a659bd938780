"""The readable kernel: masks in numpy, products in torch, on any device. Others must equal it.

Rows and attention are one thing here: values `[B, H, Q, K]`. A column brings its lane to the random
stream (feature, group of features, or key position); a row brings its key, position and row id.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.dropout.philox import NUM_LANES, lanes, philox_words
from pipeline.errors import DropoutError

MAX_KEY_POSITION = (1 << 23) - 1
_LIMITS = {"positions": 2**32 - 1, "thresholds": NUM_LANES}
_MAX_BLOCKS = 1 << 15  # blocks drawn at a time: their words stay in the cache


def rows(x: Tensor, per_row: tuple[Tensor, ...], group: int) -> Tensor:
    """Mask x `[B, M, D]`; per_row are keys, row ids, positions, thresholds, scales `[B, M]`."""
    columns = np.arange(x.shape[2])[None] // group
    return _apply(x[:, None], per_row, columns, head_offset=0)[:, 0]


def attention(x: Tensor, per_row: tuple[Tensor, ...], columns: Tensor, head_offset: int) -> Tensor:
    """Mask x `[B, H, Q, K]`; per_row as above `[B, Q]`, columns are key positions `[B, K]`."""
    lane = columns.detach().cpu().to(torch.int64).numpy()
    if lane.size and not 0 <= lane.min() <= lane.max() <= MAX_KEY_POSITION:
        raise key_position_error()
    return _apply(x, per_row, lane, head_offset)


def key_position_error() -> DropoutError:
    """What every kernel says of key positions that the counter cannot hold."""
    return DropoutError(
        f"Attention masks are defined for key positions 0 to {MAX_KEY_POSITION}, "
        "but one of these lies outside. Shorten the sequence, or switch attention dropout off."
    )


def row_error(what: str) -> DropoutError:
    """What every kernel says of positions and thresholds that are none."""
    return DropoutError(
        f"The {what} of masked rows must lie between 0 and {_LIMITS[what]}, but one lies outside. "
        "Give logical positions, and thresholds made by threshold(p)."
    )


@torch.no_grad()
def _apply(
    x: Tensor, per_row: tuple[Tensor, ...], columns: NDArray[np.int64], head_offset: int
) -> Tensor:
    heads = np.arange(head_offset, head_offset + x.shape[1])
    *integers, scales = per_row
    arrays = [_array(row) for row in integers]
    for what, array in (("positions", arrays[2]), ("thresholds", arrays[3])):
        if (array > np.uint64(_LIMITS[what])).any():  # negative ones are large here
            raise row_error(what)
    keep = torch.from_numpy(_keep(arrays, heads, columns))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = scales.to(device=x.device, dtype=wide)[:, None, :, None]
    product = (x.to(wide) * factor).to(x.dtype)
    return torch.where(keep.to(x.device), product, torch.zeros_like(product))


def _array(tensor: Tensor) -> NDArray[np.uint64]:
    return tensor.detach().cpu().to(torch.int64).numpy().view(np.uint64)


def _keep(
    integers: list[NDArray[np.uint64]], heads: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The mask `[B, H, Q, K]`: many samples at once where they share their columns."""
    num_samples, num_queries = integers[0].shape
    keep = np.empty((num_samples, len(heads), num_queries, columns.shape[1]), dtype=bool)
    if keep.size == 0:
        return keep
    shared = len(columns) == 1
    step = max(1, 8 * _MAX_BLOCKS * num_samples // keep.size) if shared else 1
    for start in range(0, num_samples, step):
        part = slice(start, start + step)
        keep[part] = _draw([row[part] for row in integers], heads, columns[0 if shared else start])
    return keep


def _draw(
    integers: list[NDArray[np.uint64]], heads: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """One Philox block serves eight neighbouring lanes; every column picks its own."""
    keys, row_ids, positions, thresholds = (row[:, None, :, None] for row in integers)
    blocks, inverse = np.unique(columns // 8, return_inverse=True)
    counter0 = heads[:, None, None] << 20 | blocks
    drawn = lanes(philox_words(keys, counter0, positions, row_ids))
    drawn = drawn.reshape(*drawn.shape[:3], len(blocks) * 8)
    return drawn[..., inverse * 8 + columns % 8] >= thresholds
