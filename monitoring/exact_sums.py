"""Sums that do not depend on the order of their terms, or on how the terms were parted.

A sum is kept as an unevaluated pair high + low, which carries about 106 bits.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Values are cut into slices of 20 bits on these fixed grids. A product of two slices has 40 bits,
# so that float64 holds the sum of 4,096 of them exactly, in whatever order it is taken.
GRIDS = (2.0**15, 2.0**-5, 2.0**-25, 2.0**-45)
LARGEST = 2.0**34
_BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class ExactSum:
    """high + low, arrays of one shape; `high` is the sum rounded to float64."""

    high: FloatArray
    low: FloatArray

    @classmethod
    def zeros(cls, *shape: int) -> "ExactSum":
        """An empty sum."""
        return cls(np.zeros(shape), np.zeros(shape))

    @classmethod
    def of(cls, values: Iterable[float]) -> "ExactSum":
        """The sum of finite numbers, as a pair of 0-dimensional arrays."""
        terms = [float(value) for value in values]
        high = math.fsum(terms)
        return cls(np.array(high), np.array(math.fsum([*terms, -high])))

    def __add__(self, other: "ExactSum") -> "ExactSum":
        """Knuth's TwoSum on the high parts, its error joined to the low ones."""
        high = self.high + other.high
        part = high - self.high
        error = (self.high - (high - part)) + (other.high - part)
        return _renormalised(high, error + (self.low + other.low))


def products(left: FloatArray, right: FloatArray) -> ExactSum:
    """left^T right for left [N, P] and right [N, Q]: [P, Q], the same for every order of rows.

    After Ozaki, Ogita, Oishi & Rump, "Error-free transformations of matrix multiplication", 2012,
    with grids that are fixed, so that parts of the rows add up to the whole. Values are rounded to
    2^-45, which float32 numbers above 2^-22 in size already are.

    Raises:
        ValueError: a value is not finite, or 2^34 and more in size.
    """
    total = ExactSum.zeros(left.shape[1], right.shape[1])
    for start in range(0, len(left), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        lefts = _slices(left[rows])
        rights = lefts if left is right else _slices(right[rows])
        for one in lefts:
            for other in rights:
                part = one.T @ other
                total = total + ExactSum(part, np.zeros_like(part))
    return total


def _renormalised(high: FloatArray, low: FloatArray) -> ExactSum:
    rounded = high + low
    return ExactSum(rounded, low - (rounded - high))


def _slices(values: FloatArray) -> list[FloatArray]:
    """What adds up to the values, largest grid first; slices of zeros are left out."""
    rest = np.asarray(values, dtype=np.float64)
    if not (np.abs(rest) < LARGEST).all():  # a NaN fails too
        raise ValueError(f"Values to add must be finite and below {LARGEST:.3g} in size.")
    slices = []
    for grid in GRIDS:
        part = np.round(rest / grid) * grid
        rest = rest - part
        if part.any():
            slices.append(part)
    return slices
