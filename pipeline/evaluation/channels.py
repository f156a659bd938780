"""How much each channel of a row is worth: quality of a plain pass in which the channel is masked.

A removed channel is masked as modality dropout masks it: by the vector that stands for it, in the
very batches of the plain pass that it is compared with.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from pipeline import parallel
from pipeline.config.schema import EvaluationConfig, RunConfig
from pipeline.evaluation.forward import logits_of
from pipeline.evaluation.intervals import mean_interval, paired_difference
from pipeline.evaluation.metrics import compute_metric
from pipeline.evaluation.predict import Predictor, model_inputs

if TYPE_CHECKING:
    from datasets import Dataset

PRESENT = "present"
_TINY = np.finfo(np.float64).tiny
Logits = dict[str, NDArray[np.float64]]


def logits_without(predictor: Predictor, rows: "Dataset", channels: tuple[str, ...]) -> Logits:
    """Logits [N, classes] of plain passes by the channel that is masked, in the order of the rows.

    On the main process; empty on the others. All processes must call it.
    """
    found = {}
    for place, name in enumerate(channels):
        parts = [
            (batch_places, _masked(predictor, batch, place, len(channels)))
            for batch_places, batch in predictor.own_batches(rows)
        ]
        every = [part for parts in parallel.to_main(parts) for part in parts]
        if every:
            order = np.array([place for places, _ in every for place in places])
            logits = np.concatenate([logits.numpy() for _, logits in every])
            found[name] = logits[order.argsort()].astype(np.float64)
    return found


def channels_of_test(
    prediction: Any, without: Mapping[str, NDArray[np.float64]], config: RunConfig
) -> dict[str, Any]:
    """`channels` of the report; nothing for a model of one input.

    Args:
        prediction: of a classifier, of all test rows.
        without: as `logits_without` gives them.
        config: the run's.
    """
    if not without:
        return {}
    whole, labels = prediction.plain.mean_probabilities.numpy(), prediction.labels.numpy()
    rates = config.dropout.modality
    found = channel_section(whole, without, labels, rates, config.evaluation, config.seed)
    return {"channels": found}


def _masked(
    predictor: Predictor, batch: Mapping[str, Tensor], place: int, num_channels: int
) -> Tensor:
    present = torch.ones(len(batch["sample_id"]), num_channels, device=predictor.device)
    present[:, place] = 0
    inputs = {**model_inputs(batch), PRESENT: present}
    return logits_of(predictor.model, inputs).float().cpu()


def channel_section(
    probabilities: NDArray[np.float64],
    without: Mapping[str, NDArray[np.float64]],
    labels: NDArray[np.int64],
    rates: Mapping[str, float],
    config: EvaluationConfig,
    seed: int,
) -> dict[str, Any]:
    """Quality with all channels and with each of them removed, on the same rows.

    Args:
        probabilities: [N, classes] of the plain pass with all channels.
        without: logits [N, classes] by the channel that is masked.
        labels: [N].
        rates: of modality dropout in training, by channel.
        config: settings of the intervals.
        seed: of the bootstrap.

    Returns:
        `all`, `without` by channel with what it changes (paired, with its interval), `rates`.
    """
    whole = _outcomes(probabilities, labels)
    removed = {}
    for name, logits in without.items():
        own = softmax(logits, axis=1)
        part = _outcomes(own, labels)
        removed[name] = _quality(own, labels, config, seed) | {
            "change": {
                measure: _change(part[measure], whole[measure], config, seed)
                for measure in ("accuracy", "loss")
            }
        }
    return {
        "all": _quality(probabilities, labels, config, seed),
        "without": removed,
        "rates": {name: float(rates.get(name, 0.0)) for name in without},
    }


def _outcomes(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """Of every row: whether it is right, and its negative log-likelihood."""
    of_label = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    return {
        "accuracy": (probabilities.argmax(axis=1) == labels).astype(np.float64),
        "loss": -np.log(np.maximum(of_label, _TINY)),
    }


def _quality(
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
    config: EvaluationConfig,
    seed: int,
) -> dict[str, Any]:
    outcomes, predictions = _outcomes(probabilities, labels), probabilities.argmax(axis=1)
    interval = mean_interval(
        outcomes["accuracy"],
        seed=seed,
        num_resamples=config.num_bootstrap_resamples,
        confidence_level=config.confidence_level,
    )
    return {
        **compute_metric("accuracy", predictions, labels),
        **compute_metric("f1", predictions, labels),
        "loss": float(outcomes["loss"].mean()),
        "accuracy_interval": list(interval),
    }


def _change(
    part: NDArray[np.float64], whole: NDArray[np.float64], config: EvaluationConfig, seed: int
) -> dict[str, Any]:
    found = paired_difference(
        part,
        whole,
        seed=seed,
        num_resamples=config.num_bootstrap_resamples,
        confidence_level=config.confidence_level,
    )
    return {"estimate": found.estimate, "interval": [found.lower, found.upper]}
