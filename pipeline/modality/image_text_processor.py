"""The processor of images with text: the model's own, its chat template, the tokens of images."""

import functools
import json
from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError
from pipeline.hub import load_pretrained
from pipeline.modality.chat_template import give_template
from pipeline.modality.image_processor import fit_image_size
from pipeline.modality.weightless import unread_parameters

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

AUTO_CLASS = "AutoModelForImageTextToText"


def load_image_text_processor(config: RunConfig, rows: "Dataset | None" = None) -> Any:
    """Tokenizer and image processor in one, with the run's own chat template.

    Raises:
        ModelError: none is named, it cannot be loaded, or it is another kind of processor.
    """
    from transformers import AutoProcessor

    name = config.model.processor_name_or_path or config.model.model_name_or_path
    if name is None:
        raise ModelError(
            "image-text-to-text needs a processor that knows the model's image token: name one "
            "with model.processor_name_or_path, or a model with model.model_name_or_path."
        )
    processor = load_pretrained("processor", AutoProcessor, name, config, backend="pil")
    parts = ("tokenizer", "image_processor", "image_token", "image_token_id")
    if missing := [part for part in parts if getattr(processor, part, None) is None]:
        raise ModelError(
            f"{name} has a {type(processor).__name__}, which lacks {', '.join(missing)}: it makes "
            "no images with text. Check model.processor_name_or_path."
        )
    give_template(processor.tokenizer, config.data.chat_template)
    if config.data.chat_template is not None or not processor.chat_template:
        processor.chat_template = processor.tokenizer.chat_template
    processor.tokenizer.chat_template = processor.chat_template
    return processor


def image_tokens(processor: Any, size: tuple[int, int]) -> list[int]:
    """What the image token becomes for an image of this width and height."""
    blank = Image.new("RGB", size)
    text = processor.image_token
    found = processor(text=text, images=[blank], add_special_tokens=False)["input_ids"]
    return list(found[0])


def fit_image_text(hf_config: "PreTrainedConfig", processor: Any, config: RunConfig) -> None:
    """Refuse a processor that was made for another model.

    Raises:
        ModelError: other tokens, another size of images, another number of tokens an image.
    """
    if not hasattr(hf_config, "vision_config") or not hasattr(hf_config, "image_token_id"):
        raise ModelError(
            f"{hf_config.model_type} takes images otherwise than as tokens of its text "
            "(it has no vision_config or image_token_id). Choose a LLaVA-like model."
        )
    if processor is None:
        return
    num_tokens, known = len(processor.tokenizer), hf_config.get_text_config().vocab_size
    if num_tokens > known:
        raise ModelError(
            f"The tokenizer has {num_tokens} tokens, the model {known}: they do not belong "
            "together; check model.processor_name_or_path."
        )
    if processor.image_token_id != hf_config.image_token_id:
        raise ModelError(
            f"The processor writes images as token {processor.image_token_id} "
            f"({processor.image_token!r}), the model reads token {hf_config.image_token_id}: check "
            "model.processor_name_or_path, or model.config_overrides."
        )
    fit_image_size(hf_config.vision_config, processor.image_processor, config)
    written = image_tokens(processor, (64, 64)).count(processor.image_token_id)
    if written != (made := num_image_tokens(hf_config)):
        raise ModelError(
            f"The processor writes {written} tokens an image, the model makes {made} features of "
            "one: patch_size, num_additional_image_tokens or vision_feature_select_strategy of the "
            "processor (processor_config.json) are another model's."
        )


def num_image_tokens(hf_config: "PreTrainedConfig") -> int:
    """Features that the model puts into the text for one image, tried without weights.

    Raises:
        ModelError: the model makes several pieces of one image, or cannot be tried.
    """
    return _num_image_tokens(hf_config.model_type, hf_config.to_json_string())


@functools.lru_cache(maxsize=16)
def _num_image_tokens(model_type: str, text: str) -> int:
    hf_config = transformers.CONFIG_MAPPING[model_type].from_dict(json.loads(text))
    auto = getattr(transformers, AUTO_CLASS)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = auto.from_config(hf_config)
            found = model.get_image_features(pixel_values=_pixels(hf_config, 1, "meta"))
        (features,) = found.pooler_output
        return int(features.shape[0])
    except Exception as error:  # whatever a modelling file says of one plain image
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{hf_config.model_type} cannot be given one image as one tensor ({first_line}): "
            "models that cut images into a varying number of pieces have rows that belong to no "
            "sample. Choose a LLaVA-like model, such as llava-hf/llava-1.5-7b-hf."
        ) from error


def image_text_example(
    hf_config: "PreTrainedConfig", batch_size: int, length: int, device: str
) -> dict[str, Tensor]:
    """An image and so many tokens of text, to trace a forward pass with."""
    num_image = num_image_tokens(hf_config)
    ids = torch.ones(batch_size, num_image + length, dtype=torch.long, device=device)
    ids[ids == hf_config.image_token_id] = 0
    ids[:, :num_image] = hf_config.image_token_id
    pixels = _pixels(hf_config, batch_size, device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def freeze_unread(model: Any) -> None:
    """Layers of the vision tower behind those that the text reads learn nothing, and DDP would wait
    for their gradients."""
    unread = unread_parameters(model, lambda: image_text_example(model.config, 2, 4, "meta"))
    for name in unread:
        model.get_parameter(name).requires_grad_(False)


def _pixels(hf_config: Any, batch_size: int, device: str) -> Tensor:
    vision = hf_config.vision_config
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    return torch.zeros(batch_size, channels, height, width, device=device)
