"""Prompts and their continuations in one forward pass: what a network says of finished sequences.

Sequences stand side by side from their first real token on, padded on the right, so that no model
sees other positions than in training; what follows a causal model's tokens does not reach them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.evaluation.forward import bare_model, logits_of
from pipeline.evaluation.token_uncertainty import IGNORED


@dataclass(frozen=True)
class Whole:
    """B prompts with continuations of at most L tokens."""

    inputs: dict[str, Tensor]
    """Of the forward pass."""
    targets: Tensor
    """The continuations, int64 `[B, L]`, -100 behind their ends."""
    starts: Tensor
    """Place of the logits that predict the first of them, int64 `[B]`."""
    continuations: list[list[int]]

    @staticmethod
    def of(bare: Any, inputs: dict[str, Tensor], continuations: list[list[int]]) -> "Whole":
        """Put continuations behind their prompts.

        Args:
            bare: the transformers model inside its adapters.
            inputs: as for `Generator.generate`, padded on either side.
            continuations: B lists of tokens.
        """
        device = next(iter(inputs.values())).device
        build = _decoded if bare.config.is_encoder_decoder else _continued
        given, starts = build(bare, inputs, continuations, device)
        targets = _padded(continuations, IGNORED, device)
        return Whole(given, targets, torch.tensor(starts, device=device), continuations)

    def logits(self, model: nn.Module) -> Tensor:
        """Logits that predict the continuations, `[B, L, V]`, under the masks in force."""
        return self._gathered(logits_of(model, self.inputs))

    def embeddings(self, model: nn.Module) -> Tensor:
        """Mean over the continuation of what its tokens are predicted from, float32 `[B, D]`."""
        seen: list[Tensor] = []
        head = bare_model(model).get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            logits_of(model, self.inputs)
        finally:
            handle.remove()
        there = (self.targets != IGNORED)[..., None]
        states = self._gathered(seen[-1]).float()
        return ((states * there).sum(1) / there.sum(1).clamp(min=1)).cpu()

    def _gathered(self, values: Tensor) -> Tensor:
        """Of a tensor `[B, T, ...]` over the inputs, the places that predict continuations."""
        first = values.shape[1] - self._length  # of learned prompt tokens, if an adapter has some
        steps = torch.arange(self.targets.shape[1], device=values.device)
        places = (first + self.starts[:, None] + steps).clamp(max=values.shape[1] - 1)
        return values[torch.arange(len(places), device=values.device)[:, None], places]

    def log_probabilities(self, model: nn.Module) -> Tensor:
        """Log-probability of every token of the continuations, float64 `[B, L]`, 0 behind them."""
        return self.log_probabilities_of(self.logits(model))

    def log_probabilities_of(self, logits: Tensor) -> Tensor:
        """The same from logits `[B, L, V]`."""
        log_p = logits.double().log_softmax(-1)
        there = self.targets != IGNORED
        found = log_p.gather(2, self.targets.clamp(min=0)[..., None]).squeeze(2)
        return found.where(there, torch.zeros_like(found)).cpu()

    @property
    def _length(self) -> int:
        name = "decoder_input_ids" if "decoder_input_ids" in self.inputs else "input_ids"
        return self.inputs[name].shape[1]


def whole_of(
    bare: Any, inputs: dict[str, Tensor], sequences: Tensor, ends: frozenset[int]
) -> Whole:
    """What `generate` returned, `[B, prompt + L]`, up to the first end token, which is kept."""
    prompt = 1
    if not bare.config.is_encoder_decoder:
        prompt = inputs["input_ids"].shape[1]
    elif "decoder_input_ids" in inputs:
        prompt = inputs["decoder_input_ids"].shape[1]
    rows = sequences[:, prompt:].tolist()
    return Whole.of(bare, inputs, [_until_end(row, ends) for row in rows])


def _until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _continued(
    bare: Any, inputs: dict[str, Tensor], continuations: list[list[int]], device: torch.device
) -> tuple[dict[str, Tensor], list[int]]:
    """For a causal model; other inputs of the prompts' shape (token types) go on with zeros."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    lengths = mask.sum(1).tolist()
    given = {name: value for name, value in inputs.items() if value.shape != ids.shape}
    for name, value in inputs.items():
        if value.shape == ids.shape and name != "attention_mask":
            prompts = [row[kept].tolist() for row, kept in zip(value, mask, strict=True)]
            added = continuations if name == "input_ids" else [[0] * len(c) for c in continuations]
            given[name] = _padded([p + c for p, c in zip(prompts, added, strict=True)], 0, device)
    ones = [[1] * (n + len(c)) for n, c in zip(lengths, continuations, strict=True)]
    return given | {"attention_mask": _padded(ones, 0, device)}, [n - 1 for n in lengths]


def _decoded(
    bare: Any, inputs: dict[str, Tensor], continuations: list[list[int]], device: torch.device
) -> tuple[dict[str, Tensor], list[int]]:
    """For an encoder-decoder: the encoder's inputs, and what the decoder has said so far."""
    begun = inputs.get("decoder_input_ids")
    start = bare.generation_config.decoder_start_token_id
    start = bare.config.decoder_start_token_id if start is None else start
    prefixes = [[start]] * len(continuations) if begun is None else begun.tolist()
    rows = [prefix + said[:-1] for prefix, said in zip(prefixes, continuations, strict=True)]
    given = inputs | {"decoder_input_ids": _padded(rows, 0, device)}
    return given, [len(prefix) - 1 for prefix in prefixes]


def _padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> Tensor:
    width = max(1, *(len(row) for row in rows), 1)
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)
