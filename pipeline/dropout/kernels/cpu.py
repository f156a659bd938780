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

import torch
from torch import Tensor

from pipeline.dropout.kernels import reference
from pipeline.dropout.kernels.self_test import self_test
from pipeline.errors import DropoutError

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_ROW_DTYPES = (torch.int64, torch.int64, torch.int64, torch.int64, torch.float32)
_FEATURES = (0, 0, 0)  # columns are features, not key positions
_CALL = Struct("=34q")  # struct Call of masks.cpp
_pack = _CALL.pack
_MIN_THREADED = 1 << 16  # below this many elements, waking threads costs more than it saves


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


def wish() -> str:
    """What the environment asks for: `numpy` on all devices, `cpp`, `flash` on GPUs, or nothing."""
    wished = os.environ.get("MASKLOCK_KERNEL", "")
    if wished not in ("", "cpp", "flash", "numpy"):
        raise DropoutError(
            f"MASKLOCK_KERNEL is {wished!r}. Set it to cpp, numpy or flash, or leave it out."
        )
    return wished


@cache
def library() -> Library | None:
    """The compiled kernel, if it is there, is not switched off, and draws the right masks."""
    wished = wish()
    built = [path for path in _places() if path.exists()] if wished != "numpy" else []
    loaded = _load(built[0]) if built else None
    if wished == "cpp" and loaded is None:
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
