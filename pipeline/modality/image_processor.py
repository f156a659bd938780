"""The image processor of a run: the model's own, or for a model from scratch one of its kind."""

from typing import TYPE_CHECKING, Any

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError
from pipeline.hub import load_pretrained

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

GREY_MEAN, GREY_STD = [0.5], [0.5]


def load_image_processor(config: RunConfig, rows: "Dataset | None" = None) -> Any:
    """What makes `pixel_values` of images, by Pillow.

    Raises:
        ModelError: the model has none, or it cannot be loaded.
    """
    from transformers import AutoImageProcessor

    model = config.model
    name = model.processor_name_or_path or model.model_name_or_path
    if name is None:
        return _from_scratch(config)
    return load_pretrained("image processor", AutoImageProcessor, name, config, backend="pil")


def mode_of(processor: Any) -> str:
    """`L` where the model sees one channel, else `RGB`."""
    mean = getattr(processor, "image_mean", None)
    return "L" if isinstance(mean, list | tuple) and len(mean) == 1 else "RGB"


def size_of(processor: Any) -> tuple[int, int]:
    """Width and height that the processor brings images to."""
    size = (
        getattr(processor, "crop_size", None)
        if getattr(processor, "do_center_crop", False)
        else None
    )
    size = dict(size or processor.size)
    if "height" in size:
        return int(size["width"]), int(size["height"])
    edge = int(size["shortest_edge"])
    return edge, edge


def fit_image_size(hf_config: "PreTrainedConfig", processor: Any, config: RunConfig) -> None:
    """Refuse a processor whose images the model does not take.

    Raises:
        ModelError: another size, or another number of channels.
    """
    if processor is None:
        return
    wanted = getattr(hf_config, "image_size", None)
    width, height = size_of(processor)
    sizes = {wanted} if isinstance(wanted, int) else set(wanted or ())
    fixed = hasattr(hf_config, "patch_size") and sizes
    if fixed and not {width, height} <= sizes:
        raise ModelError(
            f"The image processor makes images of {width} x {height} pixels, the model "
            f"{hf_config.model_type} takes {wanted}: they do not belong together. Check "
            "model.processor_name_or_path, or set model.config_overrides.image_size."
        )
    channels = {"L": 1, "RGB": 3}[mode_of(processor)]
    if hf_config.num_channels != channels:
        raise ModelError(
            f"The image processor makes {channels} channels, the model {hf_config.model_type} "
            f"takes {hf_config.num_channels}. Set model.config_overrides.num_channels, or check "
            "model.processor_name_or_path."
        )


def _from_scratch(config: RunConfig) -> Any:
    """One that only resizes and normalises, to the size and channels of the configuration."""
    from transformers import AutoConfig
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    model_type = str(config.model.model_type)
    default: Any = AutoConfig.for_model(model_type, **config.model.config_overrides)
    size = getattr(default, "image_size", None) or 32
    height, width = size if isinstance(size, list | tuple) else (size, size)
    options: dict[str, Any] = {"size": {"height": height, "width": width}}
    if default.num_channels == 1:
        options |= {"image_mean": GREY_MEAN, "image_std": GREY_STD, "do_convert_rgb": False}
    return ViTImageProcessorPil(**options)
