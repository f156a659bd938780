"""What a finished training left for the stages after it: processor, class names and model."""

import hashlib
import json
from typing import Any

from torch import nn

from pipeline.config.schema import RunConfig
from pipeline.data import PreparedData
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import RunFolderError
from pipeline.modality.bundle import LabelNames, modality_of
from pipeline.model import load_trained
from pipeline.records import RunFolder, sha256_of_file


def trained_processor(run: RunFolder, config: RunConfig) -> Any:
    """The processor that the training saved beside the weights."""
    names = dict.fromkeys(("tokenizer_name_or_path", "processor_name_or_path"), str(run.model))
    model = config.model.model_copy(update=names)
    data = config.data.model_copy(update={"chat_template": None})  # it is in the saved tokenizer
    saved = config.model_copy(update={"model": model, "data": data})
    return modality_of(config).load_processor(saved, None)


def trained_label_names(run: RunFolder) -> LabelNames:
    """Names of the classes in the order of the model's outputs; None for tasks without classes."""
    if not run.labels.is_file():
        return None
    return tuple(json.loads(run.labels.read_text(encoding="utf-8")))


def trained_model(
    run: RunFolder,
    config: RunConfig,
    plan: DropoutPlan,
    processor: Any,
    dequantize: bool = False,
) -> nn.Module:
    """The model that the training saved, an adapter on its base (in plain weights, if asked)."""
    return load_trained(run.model, config, trained_label_names(run), plan, processor, dequantize)


def model_version(run: RunFolder) -> str:
    """16 hex digits that change with any file of `model/`, its card apart, and with the plan."""
    whole = hashlib.sha256(DropoutPlan.read(run.plan).digest.encode())
    for path in sorted(path for path in run.model.rglob("*") if path.is_file()):
        if path.name == "README.md":
            continue
        name = path.relative_to(run.model).as_posix()
        whole.update(f"\0{name}\0{sha256_of_file(path)}".encode())
    return whole.hexdigest()[:16]


def require_same_labels(run: RunFolder, data: PreparedData) -> None:
    """The rows must name the classes that the model was trained on: else classes would be swapped.

    Raises:
        RunFolderError: with the names on both sides that the other does not have, or their order.
    """
    trained, found = trained_label_names(run), data.label_names
    if trained == found:
        return
    lost = sorted(set(trained or ()) - set(found or ()))[:5]
    new = sorted(set(found or ()) - set(trained or ()))[:5]
    difference = f"missing {lost}, new {new}" if lost or new else "the same names in another order"
    raise RunFolderError(
        f"The model of {run.path} was trained on {len(trained or ())} classes, the data now names "
        f"{len(found or ())} ({difference}). Evaluate on data with the classes of the training."
    )
