"""Predicts once, plain and Monte-Carlo, so that everything after it is pure functions.

Batches hold rows of like length, and processes take whole batches in turn: which process ran a row
changes no bit of it. The main process gets all results, in the order of the rows.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline import parallel
from pipeline.evaluation.batches import Batches, by_length
from pipeline.evaluation.forward import FeatureTap, PlainPass, kept_outputs, logits_of
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.evaluation.predict_classes import class_labels, no_labels, predict_classes
from pipeline.evaluation.predict_tokens import predict_next_tokens
from pipeline.evaluation.token_uncertainty import TokenUncertainty
from pipeline.evaluation.uncertainty import concatenate
from pipeline.modality.bundle import Predicts

if TYPE_CHECKING:
    from datasets import Dataset

# One for each of `Modality.predicts`: from a batch and its logits to a prediction, whose class the
# judge and the scored rows go by.
_KINDS: dict[Predicts, Callable[..., Any]] = {
    "classes": predict_classes,
    "next_tokens": predict_next_tokens,
}
Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclass
class Clock:
    """Seconds spent in plain and in Monte-Carlo passes over the same rows."""

    deterministic_seconds: float = 0.0
    seconds: float = 0.0


class Predictor:
    """Runs rows through a model whose doors are open.

    Args:
        model: the (peft-wrapped) model; put into eval mode, so that only planned sites are live.
        collate: rows -> one padded batch with `sample_id`, and `labels` where rows have them.
        monte_carlo: draws the passes.
        batch_size: rows a forward pass.
        predicts: what the model predicts, as its bundle says (`Modality.predicts`).
        lengths: of rows: those of like length run together.
    """

    def __init__(
        self,
        model: nn.Module,
        collate: Collate,
        monte_carlo: MonteCarlo,
        *,
        batch_size: int,
        predicts: Predicts,
        lengths: Callable[["Dataset"], list[int]],
    ) -> None:
        self.model = model.eval()
        self.collate, self.monte_carlo, self.batch_size = collate, monte_carlo, batch_size
        self.has_classes, self.lengths = predicts == "classes", lengths
        self._predicted = _KINDS[predicts]
        self.clock = Clock()
        self.device = next(model.parameters()).device

    def batches_of(self, rows: "Dataset") -> Batches:
        """Which rows run together."""
        return by_length(self.lengths(rows), self.batch_size)

    def predict(self, rows: "Dataset", batches: Batches | None = None) -> Any:
        """Predictions on the main process.

        Args:
            rows: prepared rows.
            batches: which of them run together, and which at all; by default all.

        Returns:
            ClassPrediction or TokenPrediction, in the order of the rows; None on the other
            processes.
        """
        parts, order = [], []
        for places, batch in self.own_batches(rows, batches):
            plain = self._timed_plain(batch)
            parts.append(self._predicted(batch, plain, self._passes(batch, plain)))
            order.extend(places)
        found = parallel.to_main((_joined(parts), order) if parts else None)
        every = [part for part in found if part is not None]
        if not every:
            return None
        return _in_order(_joined([part for part, _ in every]), sum((o for _, o in every), []))

    def features(self, rows: "Dataset") -> tuple[Tensor, Tensor]:
        """Features [N, D] of a plain pass and labels [N] (-1: none), in the order of the rows.

        On the main process; on the others both are empty.
        """
        found, labels, order = [], [], []
        for places, batch in self.own_batches(rows):
            found.append(self._plain(model_inputs(batch)).features)
            labels.append(class_labels(batch) if self.has_classes else no_labels(batch))
            order.extend(places)
        every = parallel.to_main((found, labels, order))
        if not every:
            return torch.empty(0), torch.empty(0)
        found, labels, order = (sum(parts, []) for parts in zip(*every, strict=True))
        back = _inverse(order)
        return torch.cat(found)[back], torch.cat(labels)[back]

    def slowest_clock(self) -> Clock:
        """The seconds of the process that took longest, on every process."""
        clocks = parallel.from_all(self.clock)
        return Clock(
            max(clock.deterministic_seconds for clock in clocks),
            max(clock.seconds for clock in clocks),
        )

    def own_batches(
        self, rows: "Dataset", batches: Batches | None = None
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """The batches that this process runs, with the places of their rows, on its device."""
        every = self.batches_of(rows) if batches is None else batches
        # Whole batches, not rows, are shared out: each has the shape that one process would run.
        for places in every[parallel.rank() :: parallel.world_size()]:
            batch = self.collate([rows[place] for place in places])
            yield places, {name: value.to(self.device) for name, value in batch.items()}

    def _timed_plain(self, batch: dict[str, Tensor]) -> PlainPass:
        started = time.perf_counter()
        plain = self._plain(model_inputs(batch))
        self.clock.deterministic_seconds += time.perf_counter() - started
        return plain

    def _plain(self, inputs: dict[str, Tensor]) -> PlainPass:
        with (
            FeatureTap(self.model, self.has_classes) as tap,
            kept_outputs(self.monte_carlo.body) as outputs,
        ):
            logits = logits_of(self.model, inputs)
        features = tap.pooled(inputs.get("attention_mask")).cpu()
        return PlainPass(logits, features, outputs[0] if outputs else None)

    def _passes(self, batch: dict[str, Tensor], plain: PlainPass) -> Iterator[Tensor]:
        passes = self.monte_carlo.passes(
            model_inputs(batch), batch["sample_id"], plain.body_output, batch.get("domain")
        )
        while True:
            started = time.perf_counter()
            logits = next(passes, None)
            self.clock.seconds += time.perf_counter() - started
            if logits is None:
                return
            yield logits


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of a batch."""
    aside = ("labels", "sample_id", "domain")
    return {name: value for name, value in batch.items() if name not in aside}


def _joined(parts: list[Any]) -> Any:
    """Batches of predictions as one, nested results too; tokens keep the number of their row."""
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
    order = back.argsort().tolist()  # places among the rows that ran, without gaps

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
