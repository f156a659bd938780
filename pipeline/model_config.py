"""A model's own configuration, before any weight is read: where it comes from, what we set in it.

Errors of names and overrides are found here, while nothing has been downloaded or built.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError
from pipeline.fusion import ChannelFusionConfig
from pipeline.hub import load_pretrained
from pipeline.modality.bundle import modality_of
from pipeline.modality.channels import channel_run, of_channel

_LABELS_UNKNOWN = ("0", "1")


def model_config(config: RunConfig, label_names: Sequence[str] | None) -> PreTrainedConfig:
    """The model's own configuration, with our overrides and labels; no weights are read.

    Raises:
        ModelError: no such model, or an override that its configuration does not have.
    """
    hf_config = _own_config(config)
    if modality_of(config).needs_labels:
        names = label_names or _LABELS_UNKNOWN
        hf_config.id2label = dict(enumerate(names))
        hf_config.label2id = {name: place for place, name in enumerate(names)}
        hf_config.problem_type = "single_label_classification"
    _settle_class(config, hf_config)
    return hf_config


def _own_config(config: RunConfig) -> PreTrainedConfig:
    model = config.model
    if model.model_type is not None:
        return _from_scratch(config, model.model_type)
    if model.channels:
        hf_config = _over_channels(config)
    else:
        assert model.model_name_or_path is not None
        hf_config = load_pretrained("model", AutoConfig, model.model_name_or_path, config)
    _check_overrides(config, hf_config)
    hf_config.update(model.config_overrides)
    return hf_config


def _over_channels(config: RunConfig) -> PreTrainedConfig:
    """The configuration of a model over the encoders of its channels, with theirs in it."""
    channels = config.model.channels
    encoders: dict[str, Any] = {}
    for name in channels:
        with of_channel(name):
            encoders[f"{name}_config"] = _own_config(channel_run(config, name))
    return ChannelFusionConfig(
        channel_names=list(channels),
        channel_modalities=[channel.modality for channel in channels.values()],
        **encoders,
    )


def auto_class(config: RunConfig) -> Any:
    """The class of transformers that loads models for this task."""
    return getattr(transformers, modality_of(config).auto_class)


def _settle_class(config: RunConfig, hf_config: PreTrainedConfig) -> None:
    """Where a task has two classes (DeiT, with and without teacher), from scratch the first."""
    found = auto_class(config)._model_mapping.get(type(hf_config), None)
    if isinstance(found, tuple | list) and not hf_config.architectures:
        hf_config.architectures = [found[0].__name__]


def set_rates(hf_config: PreTrainedConfig, rates: Mapping[str, float | None]) -> None:
    """Put rates into the fields that they name (`attn_pdrop`, `text_config.attn_pdrop`)."""
    for name, rate in rates.items():
        part, _, attribute = name.rpartition(".")
        if attribute != "lora_dropout":
            setattr(getattr(hf_config, part) if part else hf_config, attribute, rate)


def _from_scratch(config: RunConfig, model_type: str) -> PreTrainedConfig:
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        known = list(transformers.CONFIG_MAPPING)
        near = difflib.get_close_matches(model_type, known, n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ModelError(
            f"model.model_type {model_type!r} is not an architecture of transformers{hint}."
        ) from error
    overrides = config.model.config_overrides
    _check_overrides(config, default)
    try:  # anew, so that what follows from other fields follows from the overrides
        return AutoConfig.for_model(model_type, **overrides)
    except Exception as error:
        raise ModelError(f"model.config_overrides: {model_type} refuses them: {error}") from error


def _check_overrides(config: RunConfig, hf_config: PreTrainedConfig) -> None:
    known = hf_config.to_dict()
    unknown = [
        name
        for name in config.model.config_overrides
        if name not in known and not hasattr(hf_config, name)
        if not _is_read(name, config, hf_config)
    ]
    if unknown:
        near = {n: difflib.get_close_matches(n, known, n=1) for n in unknown}
        listed = ", ".join(
            n + (f" (did you mean {near[n][0]}?)" if near[n] else "") for n in unknown
        )
        raise ModelError(f"model.config_overrides: {hf_config.model_type} has no {listed}.")


def _is_read(name: str, config: RunConfig, hf_config: PreTrainedConfig) -> bool:
    """Whether the modelling file reads a field that has no default (DeBERTa's position_buckets)."""
    source = modelling_source(config, hf_config)
    return (
        re.search(rf"config\.{re.escape(name)}\b|config, .{re.escape(name)}.", source) is not None
    )


def modelling_source(config: RunConfig, hf_config: PreTrainedConfig) -> str:
    """The text of the file that defines the model; empty where the model has no class here."""
    try:
        found = auto_class(config)._model_mapping[type(hf_config)]
    except KeyError:
        return ""
    model_class = found[0] if isinstance(found, tuple | list) else found
    return inspect.getsource(sys.modules[model_class.__module__])
