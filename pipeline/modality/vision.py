"""Vision: image-classification. Images are decoded and varied as batches are made."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import DataSource, RunConfig
from pipeline.modality import losses
from pipeline.modality.bundle import LabelNames, Modality, register
from pipeline.modality.files import (
    encoded_rows,
    file_problems,
    files_as_arrow,
    scalars_of,
    with_labels,
)
from pipeline.modality.image_augmentation import augment_images
from pipeline.modality.image_mixing import mixed
from pipeline.modality.image_processor import fit_image_size, load_image_processor, mode_of, size_of
from pipeline.modality.images import decode_image
from pipeline.modality.labels import label_names_of

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedConfig

IMAGE = "image"
IMAGE_COLUMNS = ("text", "image", "width", "height", "brightness")


def prepare_images(
    rows: "Dataset",
    source: DataSource,
    config: RunConfig,
    processor: Any,
    label_names: LabelNames,
    *,
    max_samples: int | None = None,
) -> "Dataset":
    """One sample a row, still encoded: `image`, `sample_id` and `labels`."""
    from datasets import Image

    column, feature = source.image_column_name, Image(decode=False)
    kept, found = encoded_rows(rows, column, IMAGE, feature, max_samples)
    return with_labels(found, kept, source, label_names)


def collator(
    processor: Any, config: RunConfig
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Rows to `pixel_values` [B, C, H, W] as the processor makes them.

    Rows of the training stream have a `mask_step`: their images are varied by its key first, and
    mixed with the partner that the stream brought along.
    """
    return partial(_collate, processor=processor, config=config)


def _collate(rows: list[dict[str, Any]], *, processor: Any, config: RunConfig) -> dict[str, Tensor]:
    batch = {"pixel_values": pixels_of(rows, processor, config), **scalars_of(rows)}
    if "partner" in rows[0]:
        partners = [row["partner"] | {"mask_step": row["mask_step"]} for row in rows]
        other = _collate(partners, processor=processor, config=config)
        ids, step = [row["sample_id"] for row in rows], rows[0]["mask_step"]
        batch |= mixed(batch, other, config, ids, step)
    return batch


def pixels_of(rows: list[dict[str, Any]], processor: Any, config: RunConfig) -> Tensor:
    """`pixel_values` [B, C, H, W] of rows with their encoded `image`, float32."""
    mode = mode_of(processor)
    images = [decode_image(row[IMAGE], mode) for row in rows]
    if "mask_step" in rows[0]:
        images = augment_images(
            images,
            config.data.augmentation.image,
            config.seed,
            rows[0]["mask_step"],
            [row["sample_id"] for row in rows],
            size_of(processor),
        )
    pixels = processor(images=images, return_tensors="np")["pixel_values"]
    return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))


def image_problems(rows: "Dataset", source: DataSource, label_names: LabelNames) -> Iterator[str]:
    """A column that holds no images; everything wrong with the labels."""
    from datasets import Image

    column = source.image_column_name
    yield from file_problems(rows, column, Image, "images", source, label_names)


def described_images(rows: "Dataset", processor: Any) -> "dict[str, pa.Array]":
    """`image`, the file, for a replay; `text`, its name; what may drift: size and brightness."""
    import pyarrow as pa

    images = [decode_image(file) for file in rows[IMAGE][:]]
    return {
        "text": pa.array([str(file.get("path") or "") for file in rows[IMAGE][:]], pa.string()),
        "image": files_as_arrow(rows[IMAGE][:]),
        "width": pa.array([image.width for image in images], pa.int64()),
        "height": pa.array([image.height for image in images], pa.int64()),
        "brightness": pa.array([np.asarray(image).mean() / 255 for image in images], pa.float64()),
    }


def judge_image(row: Mapping[str, Any], config: RunConfig) -> Any:
    """The image, decoded; refused when it is broken or too large."""
    return decode_image(row[IMAGE])


def image_example(
    hf_config: "PreTrainedConfig", batch_size: int, length: int, device: str
) -> dict[str, Tensor]:
    size = getattr(hf_config, "image_size", None) or 32
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (batch_size, hf_config.num_channels, height, width)
    return {"pixel_values": torch.zeros(shape, device=device)}


IMAGE_CLASSIFICATION = register(
    Modality(
        task="image-classification",
        auto_class="AutoModelForImageClassification",
        predicts="classes",
        metric_names=("loss", "accuracy", "ece"),
        one_sample_a_row=True,
        needs_labels=True,
        inputs=lambda source: {"image_column_name": source.image_column_name},
        label_names=lambda rows, source: label_names_of(rows, source.label_column_name),
        problems=image_problems,
        load_processor=load_image_processor,
        fit=fit_image_size,
        prepare=prepare_images,
        collator=collator,
        example=image_example,
        lengths=lambda rows: [1] * len(rows),
        judge=judge_image,
        described=described_images,
        described_names=IMAGE_COLUMNS,
        loss=losses.classification_loss,
        eval_sums=losses.classification_sums,
        eval_metrics=losses.classification_metrics,
        notes=lambda processor: [],
    )
)
