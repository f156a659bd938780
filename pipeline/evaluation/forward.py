"""One forward pass in inference mode: its logits, what the body answers, what the last layer reads.

The places where the structure of a (peft-wrapped) transformers model is touched by the evaluation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of one pass, without keeping keys and values: only generation would read them."""
    takes_cache = "use_cache" in signature(bare_model(model).forward).parameters
    options = {"use_cache": False} if takes_cache else {}
    with torch.inference_mode():
        return model(**inputs, **options).logits


def bare_model(model: nn.Module) -> Any:
    """The transformers model inside its adapters."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


# -- the body ------------------------------------------------------------------------------------


def named_body(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The part of a model below its head, with its name; None where there is no such part."""
    bare = bare_model(model)
    name = getattr(bare, "base_model_prefix", "")
    body = getattr(bare, name, None) if name else None
    return (name, body) if isinstance(body, nn.Module) and body is not bare else None


@contextmanager
def kept_outputs(body: nn.Module | None) -> Iterator[list[Any]]:
    """Collects what a module answers while the block runs; nothing for None."""
    kept: list[Any] = []
    if body is None:
        yield kept
        return
    handle = body.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def fixed_output(body: nn.Module, output: Any) -> Iterator[None]:
    """The body answers with a given output in place of running."""
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del body.forward


def repeated(output: Any, times: int) -> Any:
    """A body's output for a batch of `times` copies of its rows, one copy after the other."""

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.repeat(times, *[1] * (value.dim() - 1))
        return None

    if is_dataclass(output):
        values = {field.name: repeat(getattr(output, field.name)) for field in fields(output)}
        return cast(Any, type(output))(**values)
    return tuple(repeat(value) for value in output)


def num_bytes(output: Any) -> int:
    """Size of the tensors of a body's output."""
    values = output.values() if isinstance(output, dict) else output
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


# -- the features --------------------------------------------------------------------------------


class FeatureTap:
    """Reads what the last layer reads: the features that out-of-distribution scores are fitted on.

    Args:
        model: a classifier of rows, or a language model.
        has_classes: which of the two.
    """

    def __init__(self, model: nn.Module, has_classes: bool) -> None:
        self.has_classes = has_classes
        self._seen: Tensor | None = None
        self._layers = _last_layers(model, has_classes)
        self._handles: list[Any] = []

    def __enter__(self) -> "FeatureTap":
        self._handles = [layer.register_forward_pre_hook(self._keep) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def pooled(self, attention_mask: Tensor | None) -> Tensor:
        """One feature a row, [N, D] float32.

        Where the layer reads a feature a token: the last token's for classes (what the model judges
        by), the mean over tokens for language models.
        """
        assert self._seen is not None, "the last layer was not called"
        features = self._seen.float()
        if features.dim() == 2:
            return features
        assert attention_mask is not None, "a feature a token comes with a mask of the tokens"
        attended = attention_mask.bool()
        if self.has_classes:
            places = torch.arange(attended.shape[1], device=attended.device)
            last = (attended * places).amax(dim=1)
            return features[torch.arange(len(features), device=features.device), last]
        total = (features * attended[..., None]).sum(dim=1)
        return total / attended.sum(dim=1, keepdim=True)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._seen = args[0].detach()


def _last_layers(model: nn.Module, has_classes: bool) -> list[nn.Module]:
    """The candidates; of several that are called, the last call counts."""
    bare = bare_model(model)
    if not has_classes:
        return [bare.get_output_embeddings()]
    # An adapter's own layers run after the layer that they adapt, and read something smaller.
    return [
        module
        for name, module in bare.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == bare.config.num_labels
        and "lora_" not in name
    ]


# -- a plain pass --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainPass:
    """What one pass without masks gave of a batch."""

    logits: Tensor
    features: Tensor
    body_output: Any  # None unless Monte-Carlo passes can start from it


def on_cpu(result: Any) -> Any:
    """What is kept of a batch leaves the accelerator, which holds one batch at a time."""
    return replace(result, **{f.name: getattr(result, f.name).cpu() for f in fields(result)})
