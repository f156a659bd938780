"""Decisions for whole samples or steps: drop when word 0 / 2**32 < p, under one key and row id."""

import numpy as np
import torch
from torch import Tensor

from pipeline.dropout.key import STEP_ROW_ID, signed
from pipeline.dropout.philox import philox_words
from pipeline.errors import DropoutError


def dropped(keys: Tensor, row_ids: Tensor, rates: Tensor) -> Tensor:
    """Which rows are dropped.

    Args:
        keys: int64 `[1]`, or `[B]` when rows belong to several passes.
        row_ids: int64 `[B]`, or `[B, T]` for packed rows.
        rates: probability of being dropped, float64 `[1]` or `[B]`.

    Returns:
        bool, of the shape of `row_ids` broadcast with the keys.
    """
    by_row = (-1, *[1] * (row_ids.dim() - 1))
    return _uniform(keys.reshape(by_row), row_ids) < rates.cpu().reshape(by_row)


def masked_channels(keys: Tensor, row_ids: Tensor, rates: Tensor) -> Tensor:
    """Which channel of each row is masked: one at most, each as often as its rate says.

    Channel c is masked when p_0 + ... + p_{c-1} <= word 0 / 2**32 < p_0 + ... + p_c.

    Args:
        keys: int64 `[1]`, or `[B]` when rows belong to several passes.
        row_ids: int64 `[B]`.
        rates: p, float64 `[C]`, at most 1 together.

    Returns:
        bool `[B, C]`.
    """
    uniform, upper = _uniform(keys, row_ids)[:, None], rates.cumsum(0)
    lower = torch.cat([upper.new_zeros(1), upper[:-1]])
    return (uniform >= lower) & (uniform < upper)


def dropped_steps(keys: Tensor, rates: Tensor) -> Tensor:
    """The same for decisions that all rows of a step (or pass) share; bool, of the keys' shape."""
    return dropped(keys, torch.tensor([signed(STEP_ROW_ID)]), rates)


def drop_paths(x: Tensor, is_dropped: Tensor, rates: Tensor) -> Tensor:
    """Zero the rows that are dropped and divide the others by 1 - rate.

    Stochastic depth: Huang et al., ECCV 2016; arithmetic as in transformers' `DropPath`.

    Args:
        x: `[B x m, ...]`.
        is_dropped: bool `[B]`, or `[B, T]` with a decision for each packed token.
        rates: those behind the decisions, float64 `[1]` or `[B]`.
    """
    if is_dropped.dim() == 2 and x.shape[:2] != is_dropped.shape:
        raise DropoutError(
            f"Packed row ids of shape {tuple(is_dropped.shape)} do not fit a dropped path of shape "
            f"{tuple(x.shape)}; train without packing, or set dropout.path to 0."
        )
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    if bool((rates >= 1).any()):
        rates = rates.clamp(max=0.5)  # nothing of such a row is kept
    return torch.where(over_rows(is_dropped, x), zero, x / over_rows(1 - rates, x).to(x.dtype))


def over_rows(decisions: Tensor, x: Tensor) -> Tensor:
    """Decisions of `[1]`, `[B]` or `[B, T]` in a shape that broadcasts with `[B x m, ...]`."""
    if decisions.shape[0] > 1:
        decisions = decisions.repeat_interleave(x.shape[0] // decisions.shape[0], dim=0)
    return decisions.view(*decisions.shape, *[1] * (x.dim() - decisions.dim())).to(x.device)


def _uniform(keys: Tensor, row_ids: Tensor) -> Tensor:
    """Word 0 / 2**32 of every row, float64."""
    words = philox_words(_unsigned(keys), 0, 0, _unsigned(row_ids))
    return torch.from_numpy(words[..., 0] / 2.0**32)


def _unsigned(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy().view(np.uint64)
