"""A classifier over several encoders, one a channel: their vectors projected, joined and judged.

A transformers model like others: `save_pretrained`, `from_pretrained`, AutoConfig, AutoModel. A
channel that is masked, or that a row does not have, is replaced by a vector of its own, which is
learned and begins at zero: zero alone would look to the layers behind it like a channel that was
read and says nothing, and where no channel is ever masked in training the vector stays zero.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from pipeline.dropout.modality import ModalityDropout
from pipeline.encoders import new_encoder, pooled, vector_size
from pipeline.errors import ModelError

MODEL_TYPE = "channel-fusion"
SEPARATOR = "."
"""Between a channel and the name of what its encoder takes: `photo.pixel_values`."""


class ChannelFusionConfig(PreTrainedConfig):
    """Configuration: the encoders' own under `<channel>_config`, and what joins them."""

    model_type = MODEL_TYPE

    channel_names: list[str] | None = None
    """In the order in which they are joined: lists, because JSON files are sorted by key."""
    channel_modalities: list[str] | None = None
    """text, image or audio, one a channel."""
    projection_dim: int = 256
    """Size that every channel's vector is brought to."""
    fusion_dim: int = 256
    """Size of the layer over all channels."""
    classifier_dropout: float = 0.1
    """Before the last layer."""
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.channels:
            given = kwargs.pop(f"{name}_config", None)
            if isinstance(given, dict):
                given = AutoConfig.for_model(**given)
            setattr(self, f"{name}_config", given)
        super().__post_init__(**kwargs)

    @property
    def channels(self) -> dict[str, str]:
        """Modality by channel."""
        return dict(zip(self.channel_names or (), self.channel_modalities or (), strict=True))

    @property
    def sub_configs(self) -> dict[str, type]:
        """The encoders' configurations by attribute, which transformers goes through."""
        return {f"{name}_config": AutoConfig for name in self.channels}

    def of_channel(self, name: str) -> PreTrainedConfig:
        """The configuration of a channel's encoder."""
        found: PreTrainedConfig = getattr(self, f"{name}_config")
        return found

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PreTrainedConfig:
        """This one: with several encoders there is no such thing as the text's."""
        return self


class ChannelEncoders(nn.Module):
    """The body: one vector a channel, tuple of [B, size]."""

    def __init__(self, config: ChannelFusionConfig, given: Mapping[str, PreTrainedModel]) -> None:
        super().__init__()
        self.channels = config.channels
        for name, modality in self.channels.items():
            encoder = given.get(name)
            own = config.of_channel(name)
            self.add_module(f"{name}_model", encoder or new_encoder(own, modality))

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs by name, `<channel>.<input>`."""
        return tuple(
            pooled(self.encoder(name), modality, _own(inputs, name, modality))
            for name, modality in self.channels.items()
        )

    def encoder(self, name: str) -> nn.Module:
        """The encoder of a channel."""
        return self.get_submodule(f"{name}_model")


class Fusion(nn.Module):
    """The head: projections, what stands for a missing channel, two layers."""

    def __init__(self, config: ChannelFusionConfig) -> None:
        super().__init__()
        sizes = [vector_size(config.of_channel(name)) for name in config.channels]
        self.projections = nn.ModuleList(nn.Linear(s, config.projection_dim) for s in sizes)
        self.modality = ModalityDropout()
        self.missing = nn.Parameter(torch.zeros(len(sizes), config.projection_dim))
        self.dense = nn.Linear(len(sizes) * config.projection_dim, config.fusion_dim)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.fusion_dim, config.num_labels or 2)

    def forward(self, vectors: tuple[Tensor, ...], present: Tensor | None = None) -> Tensor:
        """Logits [B, classes].

        Args:
            vectors: one a channel, [B, size].
            present: [B, channels], 0 where a row lacks a channel; by default all are there.
        """
        pairs = zip(self.projections, vectors, strict=True)
        projected_BCD = torch.stack([project(vector) for project, vector in pairs], dim=1)
        there = self._there(projected_BCD, present)[..., None]
        joined = torch.where(there, projected_BCD, self.missing.to(projected_BCD.dtype))
        hidden = self.activation(self.dense(joined.flatten(1)))
        return self.classifier(self.dropout(hidden))

    def _there(self, projected_BCD: Tensor, present: Tensor | None) -> Tensor:
        """Which channels are read; a row's only channel is never masked."""
        kept = self.modality(torch.ones(projected_BCD.shape[:2], device=projected_BCD.device)) > 0
        if present is None:
            return kept
        own = present.to(kept.device) > 0
        return torch.where((kept & own).any(1, keepdim=True), kept & own, own)


class ChannelFusionForClassification(PreTrainedModel):
    """One class a row, from all of its channels.

    Args:
        config: with the configuration of every encoder.
        encoders: some of them with their weights; the others begin anew.
    """

    config_class = ChannelFusionConfig
    base_model_prefix = "encoders"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: ChannelFusionConfig,
        encoders: Mapping[str, PreTrainedModel] | None = None,
    ) -> None:
        super().__init__(config)
        self.encoders = ChannelEncoders(config, encoders or {})
        self.fusion = Fusion(config)
        self.post_init()

    def forward(
        self,
        labels: Tensor | None = None,
        present: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Logits, and with labels the mean cross entropy.

        Args:
            labels: int64 [B].
            present: [B, channels], 0 where a row lacks a channel (its inputs are read all the
                same, and what they give is replaced).
            inputs: `<channel>.<input>`, such as `text.input_ids` and `photo.pixel_values`.

        Raises:
            ModelError: a channel has no inputs.
        """
        logits = self.fusion(self.encoders(**inputs), present)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        """Those of the first encoder of text, which always has them; else of the first encoder."""
        channels = self.encoders.channels
        first = min(channels, key=lambda name: channels[name] != "text")
        encoder: Any = self.encoders.encoder(first)
        return encoder.get_input_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Fusion):
            init.zeros_(module.missing)


def _own(inputs: Mapping[str, Tensor], channel: str, modality: str) -> dict[str, Tensor]:
    """The inputs of one channel's encoder, by the encoder's own names."""
    prefix = channel + SEPARATOR
    own = {n.removeprefix(prefix): value for n, value in inputs.items() if n.startswith(prefix)}
    if not own:
        found = ", ".join(sorted(inputs)) or "nothing"
        raise ModelError(
            f"The batch has no {modality} for the channel {channel!r}: it holds {found}. Give "
            f"{prefix}* for every row, and 0 in `present` for rows that lack the channel."
        )
    return own


AutoConfig.register(MODEL_TYPE, ChannelFusionConfig)
AutoModel.register(ChannelFusionConfig, ChannelFusionForClassification)
AutoModelForSequenceClassification.register(ChannelFusionConfig, ChannelFusionForClassification)
