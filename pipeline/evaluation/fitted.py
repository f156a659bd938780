"""What an evaluation fitted and scoring needs again: detectors and temperature, as one file.

With it rows are scored without training data, and get the very scores that the evaluation gave.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pipeline.errors import RunFolderError
from pipeline.evaluation.ood.registry import SCORES, FeatureDetector
from pipeline.records import RunFolder, write_bytes

SCHEMA = "masklock-fitted-v1"
_TEMPERATURE = "calibration/temperature"


@dataclass(frozen=True)
class Fitted:
    """Fitted to one model."""

    model_version: str
    detectors: dict[str, FeatureDetector]
    temperature: float | None
    """Of the mean Monte-Carlo probabilities; None for tasks without classes."""


def fitted_file(run: RunFolder) -> Path:
    """Where it is in a run folder."""
    return run.evaluation / "fitted.safetensors"


def write_fitted(run: RunFolder, fitted: Fitted) -> None:
    """Write the whole file or nothing."""
    tensors = {
        f"{name}/{part}": tensor.contiguous()
        for name, detector in fitted.detectors.items()
        for part, tensor in detector.state().items()
    }
    if fitted.temperature is not None:
        tensors[_TEMPERATURE] = torch.tensor(fitted.temperature, dtype=torch.float64)
    about = {"schema": SCHEMA, "model_version": fitted.model_version}
    write_bytes(fitted_file(run), save(tensors, about))


def read_fitted(run: RunFolder, model_version: str) -> Fitted:
    """Read it back, for the run's present model.

    Raises:
        RunFolderError: it is missing, damaged, or of another model.
    """
    path, again = fitted_file(run), f"Evaluate it: masklock evaluate {run.path}"
    if not path.is_file():
        raise RunFolderError(f"{run.path} has not been evaluated: there is no {path.name}. {again}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise RunFolderError(f"{path} is damaged: {error}. {again}") from error
    found = about.get("schema"), about.get("model_version")
    if found != (SCHEMA, model_version):
        raise RunFolderError(
            f"{path} was to be {SCHEMA} of model {model_version}, but is {found[0]} of model "
            f"{found[1]}: the model was trained again since. {again}"
        )
    temperature = tensors.pop(_TEMPERATURE, None)
    return Fitted(
        model_version,
        _detectors(tensors),
        None if temperature is None else float(temperature),
    )


def _detectors(tensors: dict[str, torch.Tensor]) -> dict[str, FeatureDetector]:
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        detector, _, part = name.partition("/")
        states.setdefault(detector, {})[part] = tensor
    return {
        name: score.detector.restored(states[name])
        for name, score in SCORES.items()
        if score.detector is not None and name in states
    }
