"""Loss functions and the sums behind the metrics of evaluation during training, for language tasks.

A loss is the sum over valid items divided by the items of the whole global batch: equal for 16 and
for 4 x 4.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
NUM_BINS = 15
CHUNK_ELEMENTS = 2**24  # float32 scratch of one chunk: 64 MiB

LossFunction = Callable[[Any, Tensor, Tensor | int | None], Tensor]


class _CrossEntropySum(torch.autograd.Function):
    """Sum over valid rows of (1 - eps) * -log p[y] + eps * mean over classes of -log p, in float32.

    Works through the rows in chunks and saves only the logits and one number a row: no float32 copy
    of the logits, which for a vocabulary of 150k is most of a step's memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        total = logits.new_zeros((), dtype=_scratch_dtype(logits))
        normalizers = [total[None][:0]]
        for scores, targets, valid in _chunks(logits, labels):
            normalizer = scores.logsumexp(1)
            losses = normalizer - (1 - smoothing) * scores.gather(1, targets[:, None])[:, 0]
            if smoothing:
                losses -= smoothing * scores.mean(1)
            total += losses.where(valid, 0).sum()
            normalizers.append(normalizer)
        ctx.save_for_backward(logits, labels, torch.cat(normalizers))
        ctx.smoothing = smoothing
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, normalizers = ctx.saved_tensors
        gradient, start = torch.empty_like(logits), 0
        for scores, targets, valid in _chunks(logits, labels):
            stop = start + len(scores)
            share = (scores - normalizers[start:stop, None]).exp_() - ctx.smoothing / logits.shape[
                1
            ]
            share[torch.arange(len(share), device=share.device), targets] -= 1 - ctx.smoothing
            gradient[start:stop] = (share * grad).masked_fill_(~valid[:, None], 0)
            start = stop
        return gradient, None, None


def cross_entropy_sum(logits_NC: Tensor, labels_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum, in float32, of the smoothed cross entropy over the rows whose label is not IGNORED."""
    total: Tensor = _CrossEntropySum.apply(logits_NC, labels_N, smoothing)
    return total


def classification_loss(label_smoothing: float) -> LossFunction:
    """The Trainer's `compute_loss_func` for one label a row."""

    def loss(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        logits = logits_of(outputs)
        labels = labels.to(logits.device)
        if labels.dim() == 2:
            return _of_pairs(logits, labels, label_smoothing, num_items_in_batch)
        return _per_item(logits, labels, label_smoothing, num_items_in_batch)

    return loss


def _of_pairs(
    logits: Tensor, labels_B3: Tensor, smoothing: float, items: Tensor | int | None
) -> Tensor:
    """Mixed samples: the cross entropies of both classes, weighed by the own share.

    The Trainer counts three labels a sample: own class, partner's class, share.
    """
    own, other, share = labels_B3.unbind(1)
    per_row = [
        torch.nn.functional.cross_entropy(
            logits.float(), classes.long(), reduction="none", label_smoothing=smoothing
        )
        for classes in (own, other)
    ]
    total = (share * per_row[0] + (1 - share) * per_row[1]).sum()
    return total / (len(labels_B3) if items is None else items / labels_B3.shape[1])


def causal_loss(label_smoothing: float) -> LossFunction:
    """The Trainer's `compute_loss_func` for next tokens: output t is judged by label t + 1.

    The collator sets the label of a row's first token to IGNORED. It is predicted by nothing, so
    the number of labels, which the Trainer counts (shifted or not), is that of predicted tokens.
    """

    def loss(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        logits, targets = _shift(logits_of(outputs), labels)
        return _per_item(logits, targets, label_smoothing, num_items_in_batch)

    return loss


def classification_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Float64 sums of one batch; adding them over batches and processes loses nothing."""
    valid = labels != IGNORED
    logits, labels = logits[valid], labels[valid]
    confidence, prediction = logits.float().softmax(-1).max(-1)
    correct = (prediction == labels).double()
    # Right-closed (lower, upper]: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64, device=logits.device)
    bins = (torch.bucketize(confidence.double(), edges) - 1).clamp(0, NUM_BINS - 1)
    return {
        "loss": cross_entropy_sum(logits, labels).double(),
        "count": torch.tensor(float(len(labels)), dtype=torch.float64, device=logits.device),
        "correct": correct.sum(),
        "bin_correct": torch.zeros_like(edges[1:]).index_add_(0, bins, correct),
        "bin_confidence": torch.zeros_like(edges[1:]).index_add_(0, bins, confidence.double()),
    }


def classification_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """loss, accuracy and ece: sum over bins of |correct - confidence|, over n."""
    count = float(sums["count"])
    gaps = (sums["bin_correct"] - sums["bin_confidence"]).abs().sum()
    return {
        "loss": float(sums["loss"]) / count,
        "accuracy": float(sums["correct"]) / count,
        "ece": float(gaps) / count,
    }


def causal_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Float64 sums over the predicted tokens of one batch."""
    logits, targets = _shift(logits, labels)
    valid = targets != IGNORED
    return {
        "loss": cross_entropy_sum(logits, targets).double(),
        "count": valid.sum().double(),
        "correct": (logits.argmax(-1) == targets).sum().double(),
    }


def causal_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """loss (mean over predicted tokens), perplexity = exp(loss), share of tokens guessed."""
    loss = sums["loss"] / sums["count"]
    return {
        "loss": float(loss),
        "perplexity": float(loss.exp()),
        "accuracy": float(sums["correct"] / sums["count"]),
    }


def symmetric_divergence_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over valid items of (KL(p | q) + KL(q | p)) / 2; the first half of the rows is p."""
    if logits.dim() == 3:
        num_tokens = logits.shape[1]
        flat, targets = _shift(logits, labels)
        logits, labels = flat.view(-1, num_tokens, flat.shape[1]), targets.view(-1, num_tokens)
    first, second = logits.to(_scratch_dtype(logits)).log_softmax(-1).chunk(2)
    divergence = ((first.exp() - second.exp()) * (first - second)).sum(-1) / 2
    valid = labels.to(logits.device).chunk(2)[0] != IGNORED
    return divergence.where(valid, 0).sum()


def _per_item(
    logits: Tensor, labels: Tensor, smoothing: float, num_items: Tensor | int | None
) -> Tensor:
    if num_items is None:
        num_items = (labels != IGNORED).sum().clamp(min=1)
    if torch.is_tensor(num_items):
        num_items = num_items.to(logits.device)
    return cross_entropy_sum(logits, labels, smoothing) / num_items


def _shift(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the labels they predict, flattened; a row's last position predicts nothing."""
    targets = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    return logits_BTV.flatten(0, 1), targets.flatten().to(logits_BTV.device)


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Scores in float32, targets (0 where ignored), which rows are valid; some rows at a time."""
    num_rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    for scores, targets in zip(logits.split(num_rows), labels.split(num_rows), strict=True):
        yield scores.to(_scratch_dtype(logits)), targets.clamp(min=0), targets != IGNORED


def _scratch_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def logits_of(outputs: Any) -> Tensor:
    """Of a ModelOutput or a dict; a tuple begins with the logits, since no labels were given."""
    return outputs[0] if isinstance(outputs, tuple) else outputs["logits"]
