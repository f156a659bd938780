"""Records every random draw of one forward: what went through the doors, what leaked past them.

A plan is made of such records, not of a walk over modules, which lists dead sites and misses
calls of `nn.functional.dropout`.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.dropout import doors
from pipeline.dropout.attention import open_attention
from pipeline.dropout.audit import Leak, audited
from pipeline.dropout.jitter import open_jitter
from pipeline.dropout.layer_drop import LAYER, stacks_keep_layers
from pipeline.dropout.modality import open_modality
from pipeline.dropout.residual import open_residuals
from pipeline.dropout.spectrogram import (
    SPECTROGRAM,
    SpanRequest,
    modelling_files,
    spans_by,
)
from pipeline.errors import DropoutError


@dataclass(frozen=True)
class Call:
    """One draw as it was seen: its door, site, number, rate and the shape of the tensor."""

    door: str
    site: str
    call: int
    rate: float
    shape: tuple[int, ...]


def trace(
    model: nn.Module, inputs: Mapping[str, Any], inserted: Collection[str] = ()
) -> tuple[list[Call], list[Leak]]:
    """Run one forward in training mode without masking anything.

    Args:
        model: a model on any device, `meta` included; left as it was.
        inputs: arguments of its forward.
        inserted: names of modules whose output gets an inserted site.

    Returns:
        The draws in order, and the leaks: randomness that no door opens.
    """
    calls: list[Call] = []
    counts: dict[tuple[str, str], int] = {}

    def record(door: str, site: str, x: Tensor, rate: float) -> Tensor:
        call = counts.get((door, site), 0)
        counts[door, site] = call + 1
        calls.append(Call(door, site, call, float(rate), tuple(x.shape)))
        return x

    names = doors.site_names(model)
    was_training = model.training
    with opened(names, set(inserted), record), audited(names) as leaks:
        try:
            model.train()
            model(**inputs)
        except Exception as error:
            raise DropoutError(
                f"{type(model).__name__} was to be run once, to see its dropout sites, but its "
                f"forward failed: {error}. Check model.config_overrides."
            ) from error
        finally:
            model.train(was_training)
    leaks.extend(Leak(site, kind) for site, kind in doors.unsupported_modules(names).items())
    return calls, leaks


@contextmanager
def opened(names: dict[nn.Module, str], inserted: set[str], record: doors.Draw) -> Iterator[None]:
    """Every door open to `record`, without masks, while the block runs."""
    undo = [
        doors.open_modules(names, record),
        open_attention(names, lambda site, rate: doors.SiteRate(site, record, rate)),
        doors.open_inserted(names, inserted, record),
        open_jitter(names, record),
        open_residuals(names, record),
        open_modality(names, record),
    ]
    try:
        with (
            doors.open_functional(
                lambda module: (names[module], record) if module in names else None
            ),
            stacks_keep_layers(names, lambda site, rate: _record_layer(record, site, rate)),
            spans_by(modelling_files(names), names, lambda *asked: _record_spans(record, *asked)),
        ):
            yield
    finally:
        for close in reversed(undo):
            close()


def _record_layer(record: doors.Draw, site: str, rate: float) -> None:
    record(LAYER, site, torch.ones(()), rate)


def _record_spans(record: doors.Draw, site: str, asked: SpanRequest) -> Any:
    record(SPECTROGRAM, site, torch.ones(asked.shape), asked.rate)
    return np.zeros(asked.shape, dtype=bool)
