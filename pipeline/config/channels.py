"""Channels of a model over several encoders: which encoder reads which column of a row."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from pipeline.config.roles import PositiveInt, Section

ChannelModality = Literal["text", "image", "audio"]
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TAKEN = ("quantization", "generation")  # X_config means something else to transformers


class ChannelConfig(Section):
    """One channel: its encoder, pretrained or from scratch."""

    modality: ChannelModality
    """What its column holds."""
    model_name_or_path: str | None = None
    """Hub name, local folder, or `package:NAME/FOLDER` of the encoder."""
    model_type: str | None = None
    """Architecture of an encoder from scratch, instead of `model_name_or_path`."""
    config_overrides: dict[str, Any] = {}
    """Fields of the encoder's own configuration to set."""
    model_revision: str = "main"
    """Branch, tag or commit on the hub."""
    tokenizer_name_or_path: str | None = None
    """Of text; defaults to the model's. Without either, one is trained on the channel's text."""
    processor_name_or_path: str | None = None
    """Of images and audio; defaults to the model's."""
    sampling_rate: PositiveInt | None = None
    """Of audio, in Hz, for an encoder from scratch (default 16,000)."""
    tokenizer_vocab_size: PositiveInt = 4096
    """Vocabulary size of a tokenizer trained here."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ChannelConfig":
        if (self.model_name_or_path is None) == (self.model_type is None):
            raise ValueError(
                "give exactly one of model_name_or_path (pretrained) and model_type (from scratch)"
            )
        return self


def channel_problems(task: str, channels: Mapping[str, ChannelConfig]) -> list[str]:
    """What is wrong with the channels as a whole."""
    if not channels:
        return [f"{task} needs channels: two encoders or more"] if is_multimodal(task) else []
    if not is_multimodal(task):
        return [f"channels are for multimodal-classification, not {task}; leave them out"]
    problems = [
        f"channels: {name!r} cannot be a name; take lower-case letters, digits and _"
        for name in channels
        if not _NAME.fullmatch(name) or name in _TAKEN
    ]
    if len(channels) == 1:
        problems.append("channels: there is one only; a model of one channel has a task of its own")
    return problems


def is_multimodal(task: str) -> bool:
    """Whether a task's model has channels."""
    return task == "multimodal-classification"


def rate_problems(rates: Mapping[str, float], channels: Mapping[str, Any]) -> list[str]:
    """What is wrong with the rates of modality dropout; at most one channel is masked at a time."""
    known = ", ".join(channels) or "none"
    problems = [
        f"dropout.modality.{name}: the model has no such channel (it has: {known})"
        for name in rates
        if name not in channels
    ]
    if (total := sum(rates.values())) > 1:
        problems.append(
            f"dropout.modality: the rates add up to {total:g}, above 1; at most one channel of a "
            "sample is masked, so that the rates are the parts of one draw"
        )
    return problems


def column_problems(place: str, names: Mapping[str, str], channels: Mapping[str, Any]) -> list[str]:
    """Columns named for channels that are not there."""
    return [
        f"{place}.channel_column_names.{name}: the model has no such channel "
        f"(it has: {', '.join(channels) or 'none'})"
        for name in names
        if name not in channels
    ]


def with_column_names(run: Any) -> Any:
    """A run's plain values with the column of every channel, in its data and its OOD sets.

    A channel reads the column of its own name unless `data.channel_column_names` names another; an
    OOD set has the columns of the run's data unless it names others.
    """
    if not isinstance(run, dict):
        return run
    channels, data = (_at(run, "model").get("channels"), run.get("data"))
    if not isinstance(channels, dict) or not channels or not isinstance(data, dict):
        return run
    names = {name: name for name in channels} | _at(data, "channel_column_names")
    filled = {**data, "channel_column_names": names}
    if isinstance(sets := data.get("ood"), dict):
        filled["ood"] = {
            key: {**one, "channel_column_names": names | _at(one, "channel_column_names")}
            if isinstance(one, dict)
            else one
            for key, one in sets.items()
        }
    return {**run, "data": filled}


def _at(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}
