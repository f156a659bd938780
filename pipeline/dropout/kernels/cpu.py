"""The compiled kernel for CPU tensors (masks.cpp), where it was built; otherwise numpy serves.

setuptools builds it as an optional extension and puts it beside this file. It is loaded by ctypes
and used only after it has drawn what the reference draws.
"""

import ctypes
import os
import warnings
from functools import cache
from pathlib import Path
from struct import Struct

import numpy as np
import torch
from torch import Tensor

from pipeline.dropout.kernels import reference
from pipeline.dropout.philox import lanes, philox4x32_10
from pipeline.errors import DropoutError

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_ROW_DTYPES = (torch.int64, torch.int64, torch.int64, torch.int64, torch.float32)
_FEATURES = (0, 0, 0)  # columns are features, not key positions
_pack = Struct("=34q").pack  # struct Call of masks.cpp
_MIN_THREADED = 1 << 15  # below this many elements, waking threads costs more than it saves
_KNOWN_ANSWERS = (
    (0, (0, 0, 0, 0), "6627e8d5e169c58dbc57ac4c9b00dbd8"),
    (2**64 - 1, (2**32 - 1,) * 4, "408f276d41c83b0ea20bc7c66d5451fd"),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        "d16cfe0994fdcceb5001e42024126ea1",
    ),
)


class Library:
    """The loaded shared object; its `rows` and `attention` take what those of the reference take."""

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path))
        handle.masklock_instructions.restype = ctypes.c_char_p
        handle.masklock_apply.argtypes = [ctypes.c_char_p]
        handle.masklock_philox.argtypes = [ctypes.c_uint64, ctypes.c_char_p, ctypes.c_char_p]
        self._apply = handle.masklock_apply
        self._philox = handle.masklock_philox
        self.instructions: str = handle.masklock_instructions().decode()

    def rows(self, x: Tensor, per_row: tuple[Tensor, ...], group: int) -> Tensor:
        """Mask x `[B, M, D]`."""
        y = torch.empty_like(x)
        samples, queries, columns = x.shape
        x0, x2, step = x.stride()
        y0, y2, y_step = y.stride()
        if columns > 1 and (step, y_step) != (1, 1):
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
        if x.shape[3] > 1 and (step, y_step) != (1, 1):
            return y.copy_(self.attention(x.contiguous(), per_row, columns, head_offset))
        columns = _as(columns, torch.int64)
        sizes = (*x.shape, *x_strides, *y_strides)
        key_positions = (columns.data_ptr(), *columns.stride())
        return self._run(x, y, (head_offset, 1), sizes, per_row, key_positions)

    def words(self, key: int, counter: tuple[int, ...]) -> bytes:
        """The four words of one counter, as they lie in memory."""
        lanes = ctypes.create_string_buffer(16)
        self._philox(key, np.array(counter, dtype=np.uint32).tobytes(), lanes)
        return lanes.raw

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
    what, limit = (("positions", 2**32 - 1), ("thresholds", 2**16))[status - 2]
    return DropoutError(
        f"The {what} of masked rows must lie between 0 and {limit}, but one lies outside. "
        "Give logical positions, and thresholds made by threshold(p)."
    )


@cache
def library() -> Library | None:
    """The compiled kernel, if it is there, is not switched off, and draws the right masks."""
    wish = os.environ.get("MASKLOCK_KERNEL", "")
    if wish not in ("", "cpp", "numpy"):
        raise DropoutError(f"MASKLOCK_KERNEL is {wish!r}. Set it to cpp or numpy, or leave it out.")
    paths = [] if wish == "numpy" else sorted(Path(__file__).parent.glob("_masks*.so"))
    loaded = _load(paths[0]) if paths else None
    if wish == "cpp" and loaded is None:
        raise DropoutError(
            "MASKLOCK_KERNEL asks for the compiled kernel, but there is none that works here. "
            "Install a C++ compiler and then this package again, or leave the variable out."
        )
    return loaded


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
    """What the library draws wrongly: Random123's known answers, then small tensors. Empty if nothing."""
    for key, counter, answer in _KNOWN_ANSWERS:
        drawn = np.frombuffer(loaded.words(key, counter), dtype=np.uint16)
        if bytes(drawn) != bytes(lanes(philox4x32_10(key, counter))) or answer != _hex(drawn):
            return f"a known answer of Philox4x32-10 is {_hex(drawn)} instead of {answer}"
    x = torch.linspace(-3, 3, 2 * 3 * 5 * 29).reshape(2, 3, 5, 29)
    ids = torch.tensor([[3], [-2]]).expand(2, 5)
    positions = torch.arange(5).expand(2, 5)
    row = (ids * 7**20, ids, positions, positions * 9999, positions + 0.3)
    columns = torch.stack([torch.arange(29) + 5, (torch.arange(29) - 9).clamp(min=0) * 3])
    for dtype in _FORMATS:
        y = x.to(dtype)
        if not loaded.attention(y, row, columns, 2).equal(reference.attention(y, row, columns, 2)):
            return f"an attention mask in {dtype} differs from the reference"
    return ""


def _hex(drawn: np.ndarray) -> str:
    return "".join(f"{word:08x}" for word in drawn.view(np.uint32))
