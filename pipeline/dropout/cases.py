"""Masks of named coordinates as JSON: cases in, the same cases with `keep` out.

A mask row is packed eight columns a byte, first column lowest, and written in hexadecimal.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from pipeline.dropout import kernels
from pipeline.dropout.kernels import reference
from pipeline.dropout.key import derive_key, signed
from pipeline.dropout.philox import threshold
from pipeline.dropout.variants import Variant, find_variant
from pipeline.errors import InputError

Kernel = Literal["active", "numpy"]
_SHOWN = 60  # characters of a wrong value that a message repeats

_Word = Annotated[int, Field(strict=True, ge=0, lt=2**64)]
_Position = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
_KeyPosition = Annotated[int, Field(strict=True, ge=0, le=reference.MAX_KEY_POSITION)]
_Count = Annotated[int, Field(strict=True, ge=1)]


class _Case(BaseModel):
    """What both kinds of case have: (seed, purpose, index, variant, site, call), ids, a rate."""

    arguments: tuple[_Word, str, _Word, str, str, _Word]
    ids: list[_Word] | list[list[_Word]]
    p: Annotated[float, Field(strict=True, ge=0, le=1)]

    @property
    def variant(self) -> str:
        return self.arguments[3]


class _RowsCase(_Case):
    positions: list[list[_Position]]
    features: _Count
    block_size: _Count | None = None


class _AttentionCase(_Case):
    heads: Annotated[int, Field(strict=True, ge=1, le=kernels.MAX_HEADS)]
    query_positions: list[list[_Position]]
    key_positions: list[list[_KeyPosition]]


def fill_cases(document: Any, kernel: Kernel = "active") -> dict[str, Any]:
    """The same document with `keep` in every case of `rows` and `attention`.

    Args:
        document: what `json.load` gives.
        kernel: the active one, or the numpy reference.

    Raises:
        InputError: the first case that cannot be drawn, by list, index and field.
    """
    if not isinstance(document, dict) or not {"rows", "attention"} & document.keys():
        raise InputError(
            'Mask cases must be a JSON object with "rows", "attention" or both, each a list of '
            f"cases, but this is {_shown(document)}."
        )
    fillers = {"rows": _keep_rows, "attention": _keep_attention}
    filled = {name: _fill(document, name, fillers[name], kernel) for name in fillers}
    return document | {name: cases for name, cases in filled.items() if name in document}


def _fill(
    document: dict[str, Any], name: str, keep: Callable[[Any, Kernel], Any], kernel: Kernel
) -> list[dict[str, Any]]:
    cases = document.get(name, [])
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise InputError(f"{name} must be a list of JSON objects, but it is {_shown(cases)}.")
    filled = []
    for index, case in enumerate(cases):
        try:
            filled.append({**case, "keep": keep(case, kernel)})
        except ValidationError as error:
            raise InputError(_sentence(f"{name}[{index}]", error)) from None
        except InputError as error:
            raise InputError(f"{name}[{index}].{error}") from None
        except (ValueError, RuntimeError) as error:  # not UTF-8, or more than the memory holds
            raise InputError(f"{name}[{index}] cannot be drawn: {error}") from None
    return filled


def _keep_rows(raw: Any, kernel: Kernel) -> list[list[str]]:
    case = _RowsCase.model_validate(raw)
    variant = _variant(case, "rows")
    if variant.needs_block_size and case.block_size is None:
        raise InputError("block_size: A block case needs its number of features. Add it.")
    ids, positions = _ids(case, case.positions, "positions")
    place = np.vectorize(variant.position, otypes=[np.int64])(positions)
    ones = torch.ones(*positions.shape, case.features)
    row = _per_row(case, ids, place)
    group = variant.group(case.features, case.block_size or 1)
    draw = kernels.active() if kernel == "active" else reference
    return cast(list[list[str]], _packed(draw.rows(ones, row, group)))


def _keep_attention(raw: Any, kernel: Kernel) -> list[list[list[str]]]:
    case = _AttentionCase.model_validate(raw)
    _variant(case, "attention")
    ids, queries = _ids(case, case.query_positions, "query_positions")
    columns = torch.from_numpy(_table(case.key_positions, "key_positions", len(ids)))
    ones = torch.ones(len(ids), case.heads, queries.shape[1], columns.shape[1])
    row = _per_row(case, ids, queries)
    draw = kernels.active() if kernel == "active" else reference
    return cast(list[list[list[str]]], _packed(draw.attention(ones, row, columns, 0)))


def _variant(case: _Case, kernel: str) -> Variant:
    try:
        variant = find_variant(case.variant)
    except InputError as error:
        raise InputError(f"arguments[3]: {error}") from None
    if variant.kernel != kernel:
        raise InputError(
            f"arguments[3]: The variant {variant.name!r} does not mask {kernel}. "
            "Choose one that does, or move the case."
        )
    return variant


def _ids(
    case: _Case, positions: list[list[int]], name: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row ids and positions as `[B, T]`; ids come one a sample or one a token."""
    table = _table(positions, name, len(case.ids))
    ids = [row if isinstance(row, list) else [row] * table.shape[1] for row in case.ids]
    id_table = _table(ids, "ids", len(case.ids), num_columns=table.shape[1])
    return id_table, table


def _table(
    rows: list[list[int]], name: str, num_rows: int, num_columns: int | None = None
) -> NDArray[np.int64]:
    """Lists of integers below 2**64 as one table of int64 (the same bits)."""
    lengths = {len(row) for row in rows}
    wanted = lengths if num_columns is None else {num_columns}
    if len(rows) != num_rows or not num_rows or len(lengths) != 1 or lengths != wanted:
        raise InputError(
            f"{name}: There must be one list a sample ({num_rows} by ids), all of one length"
            f"{'' if num_columns is None else f' ({num_columns} by positions)'}, "
            f"but here are {len(rows)} of the lengths {sorted(lengths)}. Complete them."
        )
    return np.array(rows, dtype=np.uint64).view(np.int64)


def _per_row(
    case: _Case, ids: NDArray[np.int64], positions: NDArray[np.int64]
) -> tuple[Tensor, ...]:
    key = torch.tensor(signed(derive_key(*case.arguments)))
    shared = (torch.tensor(threshold(case.p)), torch.tensor(1.0))
    tensors = (key, torch.from_numpy(ids), torch.from_numpy(positions), *shared)
    return tuple(tensor.expand(ids.shape) for tensor in tensors)


def _packed(masked: Tensor) -> Any:
    bits = np.packbits(masked.numpy() != 0, axis=-1, bitorder="little")
    return _hexadecimal(bits)


def _hexadecimal(bits: NDArray[np.uint8]) -> Any:
    return bits.tobytes().hex() if bits.ndim == 1 else [_hexadecimal(part) for part in bits]


def _sentence(place: str, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field, *rest = first["loc"] or ("case",)
    inside = "".join(f"[{step}]" for step in rest if isinstance(step, int))
    found = "" if first["type"] == "missing" else f", but it is {_shown(first['input'])}"
    return f"{place}.{field}{inside}: {first['msg']}{found}."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
