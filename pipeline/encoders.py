"""The encoder of a channel: any transformers model of text, images or audio; one vector a row.

What a model reads and how its last states are pooled is known here; who joins the vectors is not.
"""

from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from pipeline.errors import ModelError

READS = {
    "text": ("input_ids",),
    "image": ("pixel_values",),
    "audio": ("input_values", "input_features"),
}
"""What encoders of a modality take, by transformers' names."""
_FRAMES = "_get_feature_vector_attention_mask"


def new_encoder(hf_config: PreTrainedConfig, modality: str) -> PreTrainedModel:
    """An encoder with random weights.

    Raises:
        ModelError: the model reads something else.
    """
    model = AutoModel.from_config(hf_config, **_options(hf_config, modality))
    return encoding_part(model, modality)


def pretrained_encoder(
    folder: str, hf_config: PreTrainedConfig, modality: str, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """An encoder with the weights under a folder or hub name, and the weights that are not there.

    Args:
        folder: where they are.
        hf_config: the encoder's configuration, with our changes.
        modality: what it reads.
        options: of `from_pretrained`.

    Raises:
        ModelError: the model reads something else.
    """
    model, found = AutoModel.from_pretrained(
        folder,
        config=hf_config,
        output_loading_info=True,
        **_options(hf_config, modality),
        **options,
    )
    return encoding_part(model, modality), sorted(found["missing_keys"])


def encoding_part(model: PreTrainedModel, modality: str) -> PreTrainedModel:
    """The model, or of an encoder-decoder its encoder; refused where it does not read this."""
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if model.main_input_name not in READS[modality]:
        raise ModelError(
            f"{kind} reads {model.main_input_name}, not {modality} "
            f"({' or '.join(READS[modality])}). "
            "Choose an encoder of that modality, such as bert, vit or wav2vec2; of CLIP "
            "clip_text_model or clip_vision_model."
        )
    return model


def vector_size(hf_config: PreTrainedConfig) -> int:
    """Size of a row's pooled vector."""
    sizes = getattr(hf_config, "hidden_sizes", None)
    return int(
        sizes[-1] if sizes and not hasattr(hf_config, "hidden_size") else hf_config.hidden_size
    )


def pooled(encoder: nn.Module, modality: str, inputs: dict[str, Tensor]) -> Tensor:
    """One vector a row, [B, D].

    Text: the mean of the last states over the tokens that are no padding. Images: what the model
    pools itself, else the mean over its patches. Audio: the mean over frames that are no padding.
    """
    outputs = encoder(**inputs)
    own = getattr(outputs, "pooler_output", None)
    if modality != "text" and own is not None:
        return own.flatten(1)
    states = outputs.last_hidden_state
    if states.dim() == 4:  # feature maps [B, D, H, W]
        return states.mean((2, 3))
    mask = _own_frames(encoder, states, inputs.get("attention_mask"))
    if mask is None:
        return states.mean(1)
    kept = mask[..., None].to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1).clamp(min=1)


def _own_frames(encoder: Any, states: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Which of the last states are no padding, [B, T]; None where all count."""
    if attention_mask is None or not hasattr(encoder, _FRAMES):
        same = attention_mask is not None and attention_mask.shape[1] == states.shape[1]
        return attention_mask if same else None
    make = getattr(encoder, _FRAMES)
    return make(states.shape[1], attention_mask)


def _options(hf_config: PreTrainedConfig, modality: str) -> dict[str, Any]:
    """No pooler over text, which is pooled here: its weights would never get a gradient."""
    found: Any = AutoModel._model_mapping.get(type(hf_config), None)
    model_class = found[0] if isinstance(found, tuple | list) else found
    if model_class is None or modality != "text":
        return {}
    takes = "add_pooling_layer" in signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes else {}
