"""SpecAugment by key: which spans of a sample's features are masked, the same in any batch.

Park et al., "SpecAugment", Interspeech 2019. Number and length of spans follow `_compute_mask_
indices` of transformers as it treats one unpadded sample. This is augmentation: it is in force in
training only, never in Monte-Carlo passes.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.dropout.doors import replaced
from pipeline.dropout.philox import philox_words
from pipeline.dropout.sites import Site
from pipeline.dropout.variants import Variant
from pipeline.errors import DropoutError

SPECTROGRAM = "spectrogram"
_FUNCTION, _FEATURES = "_compute_mask_indices", "_mask_input_features"


@dataclass(frozen=True)
class SpanRequest:
    """What a model asks for when it masks spans of one axis (time or features)."""

    shape: tuple[int, int]
    """(samples, length of the axis)."""
    rate: float
    mask_length: int
    min_masks: int
    attention_mask: Tensor | None
    over_time: bool = False
    """Whether the axis is time."""

    def extents(self) -> list[tuple[int, int]]:
        """First index and length of each sample, without its padding.

        Raises:
            DropoutError: no span fits on the axis.
        """
        num_samples, length = self.shape
        if self.attention_mask is None:
            if self.mask_length > length:
                raise DropoutError(
                    f"SpecAugment was to mask spans of {self.mask_length} on an axis of {length}; "
                    "lower mask_time_length or mask_feature_length in model.config_overrides."
                )
            return [(0, length)] * num_samples
        attended = self.attention_mask.detach().long()
        firsts, lengths = attended.argmax(-1).tolist(), attended.sum(-1).tolist()
        return list(zip(firsts, lengths, strict=True))


Spans = Callable[[str, SpanRequest], NDArray[np.bool_]]
"""(site, request) -> True where features are masked, `[samples, length]`."""


def keyed_spans(
    request: SpanRequest, keys: list[int], row_ids: list[int], rates: list[float]
) -> NDArray[np.bool_]:
    """The masked places of every sample of a request.

    Args:
        request: what the model asks for.
        keys: unsigned, one a sample.
        row_ids: unsigned, one a sample.
        rates: the plan's, in place of the request's; one a sample.
    """
    masked = np.zeros(request.shape, dtype=bool)
    samples = zip(masked, request.extents(), keys, row_ids, rates, strict=True)
    for row, (first, length), key, row_id, rate in samples:
        for start in span_starts(request, length, key, row_id, rate):
            row[first + start : first + start + request.mask_length] = True
    return masked


def span_starts(
    request: SpanRequest, length: int, key: int, row_id: int, rate: float
) -> NDArray[np.int64]:
    """Where one sample's spans begin: the places with the smallest keyed numbers.

    Word 0 of counter (0, 0) rounds the number of spans; place s has word s % 4 of (s // 4, 1).
    """
    epsilon = int(philox_words(key, 0, 0, row_id)[0]) / 2**32
    num_spans = max(int(rate * length / request.mask_length + epsilon), request.min_masks)
    num_spans = min(num_spans, length // request.mask_length)
    num_places = length - request.mask_length + 1
    if num_spans <= 0:
        return np.zeros(0, dtype=np.int64)
    words = philox_words(key, np.arange(-(-num_places // 4)), 1, row_id).ravel()[:num_places]
    return np.argsort(words, kind="stable")[:num_spans].astype(np.int64)


def modelling_files(names: dict[nn.Module, str]) -> list[Any]:
    """The Python modules of transformers in which these modules look up their spans."""
    classes = {base for module in names for base in type(module).__mro__}
    files = {sys.modules[base.__module__] for base in classes}
    return [file for file in files if hasattr(file, _FUNCTION)]


@dataclass(frozen=True)
class SpanMask:
    """A planned site with what its call asked for: drawn like any other mask, for observers."""

    site: Site
    asked: SpanRequest
    variant: Variant
    rates: list[float]
    """One for all samples, or one a sample."""
    is_shared: ClassVar[bool] = False

    def attended(self, active: Any) -> Tensor | None:
        """Which places of the axis are no padding; None: all of them."""
        return self.asked.attention_mask

    def apply(self, active: Any, key: Tensor, x: Tensor) -> Tensor:
        """Zero what lies in the spans of each sample, `[samples, length]`."""
        keys = [value % 2**64 for value in key.expand(len(active.row_ids)).tolist()]
        row_ids = [value % 2**64 for value in active.row_ids.tolist()]
        rates = self.rates if len(self.rates) > 1 else self.rates * len(row_ids)
        masked = torch.from_numpy(keyed_spans(self.asked, keys, row_ids, rates))
        return x.masked_fill(masked.to(x.device), 0.0)


@contextmanager
def spans_by(files: list[Any], names: dict[nn.Module, str], spans: Spans) -> Iterator[None]:
    """While the block runs, models in these files get their spans from a function of ours."""
    with ExitStack() as patches:
        for file in files:
            replacement = _replacement(getattr(file, _FUNCTION), names, spans)
            patches.enter_context(replaced(file, _FUNCTION, replacement))
        yield


def _replacement(original: Any, names: dict[nn.Module, str], spans: Spans) -> Any:
    def compute_mask_indices(
        shape: tuple[int, int],
        mask_prob: float,
        mask_length: int,
        attention_mask: Tensor | None = None,
        min_masks: int = 0,
    ) -> Any:
        caller = sys._getframe(1).f_locals
        owner = caller.get("self")
        if not isinstance(owner, nn.Module) or owner not in names:
            return original(shape, mask_prob, mask_length, attention_mask, min_masks)
        # Spans of time come first, where there are any.
        masks_time = getattr(owner.config, "mask_time_prob", 0) > 0
        over_time = masks_time and caller.get("mask_time_indices") is None
        sizes = (shape[0], shape[1])
        asked = SpanRequest(sizes, mask_prob, mask_length, min_masks, attention_mask, over_time)
        return spans(names[owner], asked)

    return compute_mask_indices


def open_features(names: dict[nn.Module, str]) -> Callable[[], None]:
    """Keep a caller's features as they are: Whisper masks them in place; returns the undoing."""
    owners = [module for module in names if hasattr(type(module), _FEATURES)]
    for module in owners:
        module.__dict__[_FEATURES] = _on_a_copy(module)

    def close() -> None:
        for module in owners:
            del module.__dict__[_FEATURES]

    return close


def _on_a_copy(module: nn.Module) -> Callable[..., Tensor]:
    def mask_input_features(input_features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if module.training and torch.is_tensor(input_features):
            input_features = input_features.clone()
        original: Callable[..., Tensor] = getattr(type(module), _FEATURES)
        return original(module, input_features, *args, **kwargs)

    return mask_input_features
