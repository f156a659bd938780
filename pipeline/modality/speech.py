"""Speech: audio-classification. Clips are decoded, resampled and varied as batches are made."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pipeline.config.schema import DataSource, RunConfig
from pipeline.modality import losses
from pipeline.modality.audio_augmentation import augment_clips
from pipeline.modality.audio_processor import (
    audio_example,
    extractor_notes,
    fit_extractor,
    load_feature_extractor,
    model_inputs,
)
from pipeline.modality.bundle import LabelNames, Modality, register
from pipeline.modality.files import (
    encoded_rows,
    file_problems,
    files_as_arrow,
    scalars_of,
    with_labels,
)
from pipeline.modality.labels import label_names_of
from pipeline.modality.sounds import Waveform, decode_audio, duration

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

AUDIO = "audio"
CLIP_COLUMNS = ("text", "audio", "seconds", "rms_db")


def prepare_clips(
    rows: "Dataset",
    source: DataSource,
    config: RunConfig,
    processor: Any,
    label_names: LabelNames,
    *,
    max_samples: int | None = None,
) -> "Dataset":
    """One sample a row, still encoded: `audio`, `text`, `sample_id` and `labels`."""
    from datasets import Audio

    # Not decoded by datasets, which would want torchcodec and FFmpeg.
    column, feature = source.audio_column_name, Audio(decode=False)
    kept, found = encoded_rows(rows, column, AUDIO, feature, max_samples)
    found = found.add_column("text", _said(kept, found, source))
    return with_labels(found, kept, source, label_names)


def collator(
    processor: Any, config: RunConfig
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Rows to what the feature extractor makes of their clips.

    Rows of the training stream have a `mask_step`: their clips are varied by its key first.
    """
    return partial(_collate, processor=processor, config=config)


def _collate(rows: list[dict[str, Any]], *, processor: Any, config: RunConfig) -> dict[str, Tensor]:
    clips = [decode_audio(row[AUDIO], processor.sampling_rate) for row in rows]
    if "mask_step" in rows[0]:
        ids, step = [row["sample_id"] for row in rows], rows[0]["mask_step"]
        clips = augment_clips(clips, config.data.augmentation.audio, config.seed, step, ids)
    return model_inputs(processor, clips) | scalars_of(rows)


def clip_problems(rows: "Dataset", source: DataSource, label_names: LabelNames) -> Iterator[str]:
    """A column that holds no audio; everything wrong with the labels."""
    from datasets import Audio

    column = source.audio_column_name
    yield from file_problems(rows, column, Audio, "audio", source, label_names)


def judge_clip(row: Mapping[str, Any], config: RunConfig) -> Waveform:
    """The clip, decoded; refused when it is broken, silent, too short or too long."""
    data, file = config.data, row[AUDIO]
    return decode_audio(file, None, data.min_seconds, data.max_seconds)


def clip_lengths(rows: "Dataset") -> list[int]:
    """Microseconds of each clip."""
    return [round(1e6 * duration(file)) for file in rows[AUDIO][:]]


def described_clips(rows: "Dataset", processor: Any) -> "dict[str, pa.Array]":
    """`audio`, the file, for a replay; `text`; what may drift: length and loudness."""
    import pyarrow as pa

    files: Any = rows[AUDIO][:]
    clips = [decode_audio(file, processor.sampling_rate) for file in files]
    return {
        "text": pa.array(rows["text"][:], pa.string()),
        "audio": files_as_arrow(files),
        "seconds": pa.array([len(clip) / processor.sampling_rate for clip in clips], pa.float64()),
        "rms_db": pa.array([_rms_db(clip) for clip in clips], pa.float64()),
    }


def _rms_db(clip: Waveform) -> float:
    """Root of the mean square, in decibels of full scale; no clip that was judged is silent."""
    return float(10 * np.log10(np.mean(np.square(clip, dtype=np.float64))))


def _said(rows: "Dataset", clips: "Dataset", source: DataSource) -> list[str]:
    """Transcripts where rows have them, else the names of the files."""
    if source.text_column_name in rows.column_names:
        return [str(text or "") for text in rows[source.text_column_name][:]]
    return [str(file.get("path") or "") for file in clips[AUDIO][:]]


AUDIO_CLASSIFICATION = register(
    Modality(
        task="audio-classification",
        auto_class="AutoModelForAudioClassification",
        predicts="classes",
        metric_names=("loss", "accuracy", "ece"),
        one_sample_a_row=True,
        needs_labels=True,
        inputs=lambda source: {"audio_column_name": source.audio_column_name},
        label_names=lambda rows, source: label_names_of(rows, source.label_column_name),
        problems=clip_problems,
        load_processor=load_feature_extractor,
        fit=fit_extractor,
        prepare=prepare_clips,
        collator=collator,
        example=audio_example,
        lengths=clip_lengths,
        judge=judge_clip,
        described=described_clips,
        described_names=CLIP_COLUMNS,
        optional_inputs=lambda source: (source.text_column_name,),
        loss=losses.classification_loss,
        eval_sums=losses.classification_sums,
        eval_metrics=losses.classification_metrics,
        notes=extractor_notes,
    )
)
