"""The compiled kernel for CPU tensors (masks.cpp), where it was built; otherwise numpy serves.

setuptools builds it as an optional extension and puts it beside this file. It is loaded by ctypes
and used only after it has drawn what the reference draws.
"""

import ctypes
import os
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from struct import Struct

import numpy as np
import torch
from torch import Tensor

from pipeline.dropout.kernels import reference
from pipeline.dropout.key import signed
from pipeline.dropout.philox import lanes
from pipeline.errors import DropoutError

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_ROW_DTYPES = (torch.int64, torch.int64, torch.int64, torch.int64, torch.float32)
_FEATURES = (0, 0, 0)  # columns are features, not key positions
_CALL = Struct("=34q")  # struct Call of masks.cpp
_pack = _CALL.pack
_MIN_THREADED = 1 << 16  # below this many elements, waking threads costs more than it saves
_KNOWN_ANSWERS = (  # of Random123: key, counter, words
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


class Library:
    """The loaded shared object; `rows` and `attention` take what those of the reference take."""

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path))
        if handle.masklock_call_bytes() != _CALL.size:
            raise OSError("it was built from another version of masks.cpp")
        handle.masklock_instructions.restype = ctypes.c_char_p
        handle.masklock_apply.argtypes = [ctypes.c_char_p]
        self._apply = handle.masklock_apply
        self.instructions: str = handle.masklock_instructions().decode()

    def rows(self, x: Tensor, per_row: tuple[Tensor, ...], group: int) -> Tensor:
        """Mask x `[B, M, D]`."""
        y = torch.empty_like(x)
        samples, queries, columns = x.shape
        x0, x2, step = x.stride()
        y0, y2, y_step = y.stride()
        if columns > 1 and (step, y_step) != (1, 1) and x.numel():
            return y.copy_(self.rows(x.contiguous(), per_row, group))
        sizes = (samples, 1, queries, columns, x0, 0, x2, y0, 0, y2)
        return self._run(x, y, (0, group), sizes, per_row, _FEATURES)

    def attention(
        self, x: Tensor, per_row: tuple[Tensor, ...], columns: Tensor, head_offset: int
    ) -> Tensor:
        """Mask x `[B, H, Q, K]`."""
        y = torch.empty_like(x)
        *x_strides, step = x.stride()
        *y_strides, y_step = y.stride()
        if x.shape[3] > 1 and (step, y_step) != (1, 1) and x.numel():
            return y.copy_(self.attention(x.contiguous(), per_row, columns, head_offset))
        columns = _as(columns, torch.int64)
        sizes = (*x.shape, *x_strides, *y_strides)
        key_positions = (columns.data_ptr(), *columns.stride())
        return self._run(x, y, (head_offset, 1), sizes, per_row, key_positions)

    def _run(
        self,
        x: Tensor,
        y: Tensor,
        options: tuple[int, int],
        sizes: tuple[int, ...],
        per_row: tuple[Tensor, ...],
        key_positions: tuple[int, ...],
    ) -> Tensor:
        num_elements = x.numel()
        if num_elements == 0:
            return y
        num_threads = torch.get_num_threads() if num_elements >= _MIN_THREADED else 1
        per_row = tuple(map(_as, per_row, _ROW_DTYPES))
        rows = [word for row in per_row for word in (row.data_ptr(), *row.stride())]
        start = (x.data_ptr(), y.data_ptr(), _FORMATS[x.dtype], num_threads)
        status = self._apply(_pack(*start, *options, *sizes, *rows, *key_positions))
        if status:
            raise _error(status)
        return y


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype is dtype and tensor.is_cpu:
        return tensor
    return tensor.to("cpu", dtype)


def _error(status: int) -> DropoutError:
    if status == 1:
        return reference.key_position_error()
    return reference.row_error(("positions", "thresholds")[status - 2])


@cache
def library() -> Library | None:
    """The compiled kernel, if it is there, is not switched off, and draws the right masks."""
    wish = os.environ.get("MASKLOCK_KERNEL", "")
    if wish not in ("", "cpp", "numpy"):
        raise DropoutError(f"MASKLOCK_KERNEL is {wish!r}. Set it to cpp or numpy, or leave it out.")
    built = [path for path in _places() if path.exists()] if wish != "numpy" else []
    loaded = _load(built[0]) if built else None
    if wish == "cpp" and loaded is None:
        raise DropoutError(
            "MASKLOCK_KERNEL asks for the compiled kernel, but there is none that works here. "
            "Install a C++ compiler and then this package again, or leave the variable out."
        )
    return loaded


def _places() -> list[Path]:
    """Where setuptools puts the extension for this Python, most specific name first."""
    return [Path(__file__).with_name(f"_masks{suffix}") for suffix in EXTENSION_SUFFIXES]


def _load(path: Path) -> Library | None:
    try:
        loaded = Library(path)
        trouble = self_test(loaded)
    except (OSError, AttributeError) as error:
        trouble = str(error)
    if not trouble:
        return loaded
    warnings.warn(
        f"The compiled dropout kernel {path.name} is not used, numpy serves instead (slower): "
        f"{trouble}. Install this package again.",
        stacklevel=2,
    )
    return None


def self_test(loaded: Library) -> str:
    """What the library gets wrong: known answers, then products in each dtype. Empty if nothing."""
    for key, counter, words in _KNOWN_ANSWERS:
        if not _draws(loaded, key, counter, words):
            return f"it does not draw the known answer of Philox4x32-10 for counter {counter}"
    x = torch.linspace(-3, 3, 2 * 3 * 5 * 29).reshape(2, 3, 5, 29)
    ids = torch.tensor([[3], [-2]]).expand(2, 5)
    positions = torch.arange(5).expand(2, 5)
    row = (ids * 7**20, ids, positions, positions * 9999, positions + 0.3)
    columns = torch.stack([torch.arange(29) + 5, (torch.arange(29) - 9).clamp(min=0) * 3])
    for dtype in _FORMATS:
        y = x.to(dtype)
        if not loaded.attention(y, row, columns, 2).equal(reference.attention(y, row, columns, 2)):
            return f"its products in {dtype} differ from the reference"
    return ""


def _draws(loaded: Library, key: int, counter: tuple[int, ...], words: tuple[int, ...]) -> bool:
    """Whether each lane is kept under its own value as threshold, and dropped under one more."""
    lane_values = lanes(np.array(words, dtype=np.uint32)).astype(np.int64)
    thresholds = torch.from_numpy(np.stack([lane_values, lane_values + 1])).reshape(1, 16)
    row_id = signed(counter[2] | counter[3] << 32)
    row = [torch.tensor(value).expand(1, 16) for value in (signed(key), row_id, counter[1])]
    columns = (counter[0] & 0xFFFFF) * 8 + torch.arange(8)[None]
    per_row = (*row, thresholds, torch.ones(1, 16))
    kept = loaded.attention(torch.ones(1, 1, 16, 8), per_row, columns, counter[0] >> 20)
    at_value, above_value = kept.reshape(2, 8, 8).diagonal(dim1=1, dim2=2)
    return bool(at_value.eq(1).all() and above_value.eq(0).all())
