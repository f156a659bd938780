"""Logical positions of the tokens of one call: independent of padding, packing and caching.

A token's mask must not depend on how its batch was padded, packed or cut. One rule a stack
(encoder, decoder): `position_ids` if given; else `cumsum(attention_mask) - 1`, clamped at 0; else
cache length + arange.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

_FRAMES = "_get_feature_vector_attention_mask"
_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids")
_SIGNALS = ("pixel_values", "input_values", "input_features")


@lru_cache(maxsize=512)
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def is_stack(module: nn.Module) -> bool:
    """Whether a module takes tokens and their mask: it fixes the positions of everything inside it.

    Embedding layers take tokens but no mask, and know nothing of padding.
    """
    names = _parameters(type(module).forward)
    takes_tokens = "input_ids" in names or "inputs_embeds" in names
    return "attention_mask" in names and (takes_tokens or _takes_waves(module))


def fixes_positions(module: nn.Module) -> bool:
    """Whether what is inside a module has positions of its own: a stack, or an encoder of images or
    sounds, whose tokens are none of a text around it (the vision tower of a multimodal model)."""
    names = _parameters(type(module).forward)
    return is_stack(module) or (bool(set(_SIGNALS) & set(names)) and not set(_INPUTS) & set(names))


def _takes_waves(module: nn.Module) -> bool:
    """Whether a module makes frames of waves, and knows which of them are padding."""
    return "input_values" in _parameters(type(module).forward) and hasattr(module, _FRAMES)


@dataclass
class StackInputs:
    """What one call of a stack says about positions.

    Tensors are `[B, T]`; masks of a call with a cache count the cached tokens too.
    """

    length: int
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    cache_length: int = 0
    _cache: dict[Any, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "StackInputs | None":
        """Read the inputs of a stack's call; None when it was given no tokens."""
        names = _parameters(type(module).forward)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if not is_stack(module):
            return _NUMBERED
        if _takes_waves(module):
            return _frames(module, given.get("input_values"), _matrix(given.get("attention_mask")))
        tokens = next((given[name] for name in _INPUTS if given.get(name) is not None), None)
        if tokens is None:
            return None
        return StackInputs(
            length=tokens.shape[1] if tokens.dim() > 1 else 1,
            position_ids=_matrix(given.get("position_ids")),
            attention_mask=_matrix(given.get("attention_mask")),
            encoder_attention_mask=_matrix(given.get("encoder_attention_mask")),
            cache_length=_length_of(given.get("cache") or given.get("past_key_values")),
        )

    def queries(self, device: torch.device, first: int = 0) -> Tensor:
        """Positions of this call's tokens, int64 `[B or 1, T]`.

        Args:
            first: of the first token, where the sequence is cut; `position_ids` know it themselves.
        """
        positions = self._kept("queries", self._queries, device)
        return positions + first if first and self.position_ids is None else positions

    def keys(self, num_keys: int, device: torch.device) -> Tensor:
        """Positions of all that the tokens attend to, cached ones first, int64 `[B or 1, K]`."""
        return self._kept(("keys", num_keys), lambda: self._keys(num_keys), device)

    def encoder_keys(self, num_keys: int, device: torch.device) -> Tensor:
        """Positions of the encoder's tokens in cross-attention, int64 `[B or 1, K]`."""
        return self._kept(
            ("encoder", num_keys), lambda: _from_mask(self.encoder_attention_mask, num_keys), device
        )

    def _kept(self, name: Any, make: Any, device: torch.device) -> Tensor:
        if name not in self._cache:
            self._cache[name] = make().to(device)
        return self._cache[name]

    def _queries(self) -> Tensor:
        if self.position_ids is not None:
            return self.position_ids.long()
        return self._so_far()[:, -self.length :]

    def _keys(self, num_keys: int) -> Tensor:
        if num_keys == self.length:
            return self._queries()
        so_far = self._so_far()
        missing = num_keys - so_far.shape[1]
        if missing <= 0:  # a sliding window has let go of the oldest
            return so_far[:, -num_keys:]
        # A static cache has room for tokens to come; nothing attends to them yet.
        return torch.cat([so_far, so_far[:, -1:] + 1 + torch.arange(missing).to(so_far)], dim=1)

    def _so_far(self) -> Tensor:
        """Positions of the cached tokens and of this call's."""
        return _from_mask(self.attention_mask, self.cache_length + self.length)


_NUMBERED = StackInputs(length=0)
"""Of an encoder that knows no padding: positions are counted, whatever the length."""


def _frames(module: Any, waves: Tensor | None, attention_mask: Tensor | None) -> StackInputs:
    """What the convolutions of a speech model leave of a padded batch; counted without padding."""
    if waves is None or attention_mask is None:
        return _NUMBERED
    make_mask = getattr(module, _FRAMES)
    options = {"add_adapter": False} if "add_adapter" in _parameters(make_mask) else {}
    length = int(module._get_feat_extract_output_lengths(waves.shape[1], **options))
    mask = make_mask(length, attention_mask, **options)
    return StackInputs(length=length, attention_mask=mask)


def _length_of(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _matrix(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def _from_mask(mask: Tensor | None, length: int) -> Tensor:
    if mask is None or mask.shape[1] != length:
        return torch.arange(length)[None]
    return (mask.long().cumsum(-1) - 1).clamp_(min=0)
