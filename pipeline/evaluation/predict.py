"""Predicts once, so that everything after it is pure functions: rows through a model, deterministic and Monte-Carlo.

Batches hold rows of like length; results come back in the order of the rows. No number depends on the batches.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.evaluation.token_uncertainty import SampleUncertainty, TokenSums, TokenUncertainty
from pipeline.evaluation.uncertainty import MonteCarloSums, Uncertainty, concatenate

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True)
class ClassPrediction:
    """What a classifier says about N rows, in one plain pass and in T Monte-Carlo passes."""

    sample_ids: Tensor  # [N] int64
    features: Tensor  # [N, D] float32: what the last layer reads
    logits: Tensor  # [N, C] float32, of the plain pass
    labels: Tensor  # [N] int64, -1 where a row has none
    plain: Uncertainty
    monte_carlo: Uncertainty


@dataclass(frozen=True)
class TokenPrediction:
    """What a language model says about N samples, and about each of their M predicted tokens."""

    sample_ids: Tensor  # [N] int64
    features: Tensor  # [N, D] float32: mean over the tokens of what the last layer reads
    plain: SampleUncertainty
    monte_carlo: SampleUncertainty
    plain_tokens: TokenUncertainty
    monte_carlo_tokens: TokenUncertainty


@dataclass
class Clock:
    """Seconds spent in plain and in Monte-Carlo passes."""

    deterministic_seconds: float = 0.0
    seconds: float = 0.0


class Predictor:
    """Runs rows through a model whose doors are open.

    Args:
        model: the (peft-wrapped) model; put into eval mode, so that only planned sites are live.
        collate: rows -> one padded batch with `sample_id`, and `labels` where rows have them.
        monte_carlo: draws the passes.
        batch_size: rows a forward pass.
        has_classes: whether the model classifies rows (otherwise it predicts tokens).
    """

    def __init__(
        self,
        model: nn.Module,
        collate: Collate,
        monte_carlo: MonteCarlo,
        *,
        batch_size: int,
        has_classes: bool,
    ) -> None:
        self.model = model.eval()
        self.collate, self.monte_carlo, self.batch_size = collate, monte_carlo, batch_size
        self.has_classes = has_classes
        self.clock = Clock()
        self._device = next(model.parameters()).device

    def predict(self, rows: Sequence[dict[str, Any]]) -> ClassPrediction | TokenPrediction:
        """Predictions for all rows, in their order."""
        one_batch = self._classes if self.has_classes else self._tokens
        parts, order = [], []
        for places, batch in self._batches(rows):
            parts.append(one_batch(batch))
            order.extend(places)
        return _in_order(_joined(parts), order)

    def features(self, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Only the features [N, D] and labels [N] (-1: none) of a plain pass, in the order of the rows."""
        found, labels, order = [], [], []
        for places, batch in self._batches(rows):
            given = batch.get("labels")
            labels.append(given if self.has_classes and given is not None else _no_labels(batch))
            found.append(self._plain(_inputs(batch))[1])
            order.extend(places)
        back = _inverse(order)
        return torch.cat(found)[back], torch.cat(labels)[back]

    def _batches(
        self, rows: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        lengths = [len(ids) for ids in rows["input_ids"]]  # type: ignore[call-overload]
        by_length = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        for start in range(0, len(by_length), self.batch_size):
            places = by_length[start : start + self.batch_size]
            batch = self.collate([rows[place] for place in places])
            yield places, {name: value.to(self._device) for name, value in batch.items()}

    def _plain(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        with torch.inference_mode(), FeatureTap(self.model, self.has_classes) as tap:
            logits = self.model(**inputs).logits
        self.clock.deterministic_seconds += time.perf_counter() - started
        return logits, tap.pooled(inputs["attention_mask"])

    def _passes(self, inputs: dict[str, Tensor], sample_ids: Tensor) -> Iterator[Tensor]:
        passes = self.monte_carlo.passes(inputs, sample_ids)
        while True:
            started = time.perf_counter()
            logits = next(passes, None)
            self.clock.seconds += time.perf_counter() - started
            if logits is None:
                return
            yield logits

    def _classes(self, batch: dict[str, Tensor]) -> ClassPrediction:
        inputs = _inputs(batch)
        logits, features = self._plain(inputs)
        plain, sums = MonteCarloSums(), MonteCarloSums()
        plain.update(logits)
        for one_or_more in self._passes(inputs, batch["sample_id"]):
            sums.update(one_or_more)
        return ClassPrediction(
            sample_ids=batch["sample_id"],
            features=features,
            logits=logits.float(),
            labels=batch.get("labels", _no_labels(batch)),
            plain=plain.result(),
            monte_carlo=sums.result(),
        )

    def _tokens(self, batch: dict[str, Tensor]) -> TokenPrediction:
        inputs, targets = _inputs(batch), batch["labels"][:, 1:]
        logits, features = self._plain(inputs)
        plain, sums = TokenSums(targets), TokenSums(targets)
        plain.update(logits[:, :-1])
        for logits in self._passes(inputs, batch["sample_id"]):
            sums.update(logits[:, :-1])
        plain_tokens, tokens = plain.result(), sums.result()
        return TokenPrediction(
            sample_ids=batch["sample_id"],
            features=features,
            plain=plain_tokens.per_sample(len(targets)),
            monte_carlo=tokens.per_sample(len(targets)),
            plain_tokens=plain_tokens,
            monte_carlo_tokens=tokens,
        )


class FeatureTap:
    """Reads what the last layer reads: the features that out-of-distribution scores are fitted on."""

    def __init__(self, model: nn.Module, has_classes: bool) -> None:
        self.has_classes = has_classes
        self._seen: Tensor | None = None
        self._modules = _last_layers(model, has_classes)
        self._handles: list[Any] = []

    def __enter__(self) -> "FeatureTap":
        self._handles = [m.register_forward_pre_hook(self._keep) for m in self._modules]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def pooled(self, attention_mask: Tensor) -> Tensor:
        """[N, D] float32; of a feature a token, the last token's (classes) or the mean of all (tokens)."""
        assert self._seen is not None, "the last layer was not called"
        features, attended = self._seen.float(), attention_mask.bool()
        if features.dim() == 2:
            return features
        if self.has_classes:
            places = torch.arange(attended.shape[1], device=attended.device)
            last = (attended * places).amax(dim=1)
            return features[torch.arange(len(features), device=features.device), last]
        total = (features * attended[..., None]).sum(dim=1)
        return total / attended.sum(dim=1, keepdim=True)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._seen = args[0].detach()


def _last_layers(model: nn.Module, has_classes: bool) -> list[nn.Module]:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not has_classes:
        return [bare.get_output_embeddings()]
    linear = [m for m in bare.modules() if isinstance(m, nn.Linear)]
    return [m for m in linear if m.out_features == bare.config.num_labels]


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in ("labels", "sample_id")}


def _no_labels(batch: dict[str, Tensor]) -> Tensor:
    return torch.full_like(batch["sample_id"], -1)


def _joined(parts: list[Any]) -> Any:
    """Batches of predictions as one; nested results too, and tokens keep the number of their row."""
    first, joined = parts[0], {}
    sizes = [len(part.sample_ids) for part in parts]
    offsets = torch.tensor([0, *sizes]).cumsum(0).tolist()
    for field in fields(first):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], TokenUncertainty):
            values = [
                replace(v, row=v.row + offset) for v, offset in zip(values, offsets, strict=False)
            ]
        joined[field.name] = (
            torch.cat(values) if isinstance(values[0], Tensor) else concatenate(values)
        )
    return type(first)(**joined)


def _in_order(prediction: Any, order: list[int]) -> Any:
    back = _inverse(order)

    def sort(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[back]
        if isinstance(value, TokenUncertainty):
            return _tokens_in_order(value, torch.tensor(order))
        return replace(value, **{f.name: getattr(value, f.name)[back] for f in fields(value)})

    return type(prediction)(
        **{f.name: sort(getattr(prediction, f.name)) for f in fields(prediction)}
    )


def _tokens_in_order(tokens: TokenUncertainty, order: Tensor) -> TokenUncertainty:
    row = order[tokens.row]
    back = row.argsort(stable=True)
    moved = {f.name: getattr(tokens, f.name)[back] for f in fields(tokens)}
    return TokenUncertainty(**{**moved, "row": row[back]})


def _inverse(order: list[int]) -> Tensor:
    return torch.tensor(order).argsort()
