"""Random words by counter: Philox4x32-10 in numpy, and the decisions made from its words.

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11;
original code: Random123, `philox.h`. Ten rounds, its constants.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.dropout.key import derive_key
from pipeline.errors import DropoutError

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_NUM_ROUNDS = 10
NUM_LANES = 65536
"""Lanes are 16 bits wide: a rate is rounded to a multiple of 1 / 65536."""

Words = NDArray[np.uint32]


def split(value: ArrayLike) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Low and high half of 64-bit integers."""
    whole = np.asarray(value, dtype=np.uint64)
    return whole & _LOW, whole >> _HALF


def philox_words(key: ArrayLike, c0: ArrayLike, c1: ArrayLike, row_id: ArrayLike) -> Words:
    """The four words `[..., 4]` of each counter (c0, c1, row id); all four broadcast."""
    k0, k1 = split(key)
    x0, x1 = np.asarray(c0, dtype=np.uint64), np.asarray(c1, dtype=np.uint64)
    x2, x3 = split(row_id)
    for _ in range(_NUM_ROUNDS):
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (product1 >> _HALF) ^ x1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF) ^ x3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    words = np.broadcast_arrays(x0, x1, x2, x3)
    return np.stack(words, axis=-1).astype("<u4")


def philox4x32_10(key: int, counter: ArrayLike) -> Words:
    """The four words of each counter `[..., 4]` under one key."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    return philox_words(key, c0, c1, c2 | c3 << _HALF)


def lanes(words: Words) -> NDArray[np.uint16]:
    """The eight 16-bit lanes `[..., 8]` of four words: low half first."""
    return np.ascontiguousarray(words, dtype="<u4").view("<u2")


def threshold(p: float) -> int:
    """Lanes below this are dropped: round(65536 p), half to even."""
    if not 0.0 <= p <= 1.0:
        raise DropoutError(
            f"A dropout rate must lie between 0 and 1, but this one is {p}. "
            "Give the share of values to drop."
        )
    return round(NUM_LANES * p)


def scale(t: int) -> float:
    """What kept values are multiplied by under threshold t, rounded to float32; 0 if all drop."""
    if not 0 <= t <= NUM_LANES:
        raise DropoutError(
            f"A threshold must lie between 0 and {NUM_LANES}, but this one is {t}. "
            "Make it from a rate with threshold(p)."
        )
    return float(np.float32(NUM_LANES / (NUM_LANES - t))) if t < NUM_LANES else 0.0


def uniform(key: int, row_id: int) -> float:
    """One number in [0, 1) for a whole sample (or, under the step's id, for a whole step)."""
    return int(philox_words(key, 0, 0, row_id)[0]) / 2**32


def permutation(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    """The order in which an epoch visits rows 0 .. num_rows - 1."""
    key = derive_key(seed, "order", epoch, "permutation", "train", 0)
    words = philox_words(key, 0, 0, np.arange(num_rows)).astype(np.uint64)
    # A stable sort keeps ties in the order of their ids.
    order = np.argsort(words[:, 1] << _HALF | words[:, 0], kind="stable")
    return order.astype(np.int64)
