"""Multimodal: multimodal-classification. A row has several channels, each with an encoder.

A channel is text, an image or a clip: also a second text, such as context that was retrieved.
Prepared rows and batches name the parts of a channel `<channel>.<part>`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.config.schema import DataSource, RunConfig
from pipeline.fusion import SEPARATOR
from pipeline.modality import language, losses, speech, vision
from pipeline.modality.audio_processor import (
    audio_example,
    extractor_notes,
    fit_extractor,
    load_feature_extractor,
)
from pipeline.modality.bundle import LabelNames, Modality, Prepare, kept_rows, register
from pipeline.modality.channels import ChannelProcessor, channel_run, of_channel
from pipeline.modality.files import SCALARS, scalars_of, with_labels
from pipeline.modality.image_processor import fit_image_size, load_image_processor
from pipeline.modality.labels import label_names_of, label_problems
from pipeline.modality.quarantine import BadSample
from pipeline.modality.tokenizer import fit_to_tokenizer, token_example

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Rows = list[dict[str, Any]]
Collate = Callable[[Rows], dict[str, Tensor]]


@dataclass(frozen=True)
class _Kind:
    """What is done with a channel of one modality, by the functions of the modality itself."""

    part: str
    """The column of prepared rows that its collator reads."""
    load: Callable[..., Any]
    fit: Callable[..., None]
    example: Callable[..., dict[str, Tensor]]
    collator: Callable[[Any, RunConfig], Collate]
    problems: Callable[..., Iterator[str]]
    judge: Callable[..., Any] | None
    lengths: Callable[["Dataset"], list[int]] | None
    """None where all are alike."""
    described: Callable[..., "dict[str, pa.Array]"]
    described_names: tuple[str, ...]
    prepare: Prepare
    notes: Callable[[Any], list[str]]


KINDS = {
    "text": _Kind(
        part="input_ids",
        load=language.tokenizer_of_rows,
        fit=fit_to_tokenizer,
        example=token_example,
        collator=partial(language.collator, causal=False),
        problems=language.classification_problems,
        judge=None,
        lengths=language.token_lengths,
        described=language.described_text,
        described_names=language.TEXT_COLUMNS,
        prepare=language.prepare_classification,
        notes=language.classification_notes,
    ),
    "image": _Kind(
        part="image",
        load=load_image_processor,
        fit=fit_image_size,
        example=vision.image_example,
        collator=vision.collator,
        problems=vision.image_problems,
        judge=vision.judge_image,
        lengths=None,
        described=vision.described_images,
        described_names=vision.IMAGE_COLUMNS,
        prepare=vision.prepare_images,
        notes=lambda processor: [],
    ),
    "audio": _Kind(
        part="audio",
        load=load_feature_extractor,
        fit=fit_extractor,
        example=audio_example,
        collator=speech.collator,
        problems=speech.clip_problems,
        judge=speech.judge_clip,
        lengths=speech.clip_lengths,
        described=speech.described_clips,
        described_names=speech.CLIP_COLUMNS,
        prepare=speech.prepare_clips,
        notes=extractor_notes,
    ),
}


def channels_of(config: RunConfig) -> dict[str, _Kind]:
    """What is done with each channel of a run."""
    return {name: KINDS[channel.modality] for name, channel in config.model.channels.items()}


def load_processors(config: RunConfig, rows: "Dataset | None" = None) -> ChannelProcessor:
    """The processor of every channel.

    Raises:
        ModelError: one is missing, with the channel.
    """
    parts = {}
    for name, kind in channels_of(config).items():
        with of_channel(name):
            parts[name] = kind.load(channel_run(config, name), rows)
    return ChannelProcessor(parts)


def fit_channels(hf_config: Any, processor: ChannelProcessor | None, config: RunConfig) -> None:
    """Give every encoder's configuration what follows from its processor.

    Raises:
        ModelError: the two do not belong together.
    """
    for name, kind in channels_of(config).items():
        part = None if processor is None else processor.parts[name]
        with of_channel(name):
            kind.fit(hf_config.of_channel(name), part, channel_run(config, name))


def prepare_channels(
    rows: "Dataset",
    source: DataSource,
    config: RunConfig,
    processor: ChannelProcessor,
    label_names: LabelNames,
    *,
    max_samples: int | None = None,
) -> "Dataset":
    """One sample a row: `<channel>.input_ids`, `.image` or `.audio`, `text`, `sample_id`, `labels`.

    `text` is that of the channel `text`, or of the first one that is text, or the image's or clip's
    file.
    """
    from datasets import concatenate_datasets

    kept, numbers = kept_rows(rows, max_samples)
    parts = {
        name: _prepared(kept, source, config, processor.parts[name], name)
        for name in config.model.channels
    }
    renamed = [
        part.rename_columns({column: name + SEPARATOR + column for column in part.column_names})
        for name, part in parts.items()
    ]
    found = concatenate_datasets(renamed, axis=1).add_column("text", _said(parts))
    found = found.add_column("sample_id", numbers)
    return with_labels(found, kept, source, label_names)


def _prepared(
    rows: "Dataset", source: DataSource, config: RunConfig, processor: Any, name: str
) -> "Dataset":
    """One channel, as its own modality prepares it: without numbers, which all channels share."""
    kind, own = channels_of(config)[name], _own_source(source, config, name)
    column = rows.select_columns([source.channel_column_names[name]])
    found = kind.prepare(column, own, channel_run(config, name), processor, None)
    aside = [n for n in ("sample_id", "attention_mask") if n in found.column_names]
    return found.remove_columns(aside)


def _own_source(source: DataSource, config: RunConfig, channel: str) -> DataSource:
    """The source as the channel's modality reads it."""
    modality, column = config.model.channels[channel].modality, source.channel_column_names[channel]
    return source.model_copy(update={f"{modality}_column_name": column})


def _said(parts: "Mapping[str, Dataset]") -> list[str]:
    read = [name for name in parts if "input_ids" in parts[name].column_names]
    for name in sorted(read, key=lambda name: name != "text"):
        return [str(text) for text in parts[name]["text"][:]]
    first = next(iter(parts.values()))
    part = "image" if "image" in first.column_names else "audio"
    return [str(file.get("path") or "") for file in first[part][:]]


def collator(processor: ChannelProcessor, config: RunConfig) -> Collate:
    """Rows to the inputs of every encoder, `<channel>.<input>`, each as its modality makes them."""
    collate = {
        name: kind.collator(processor.parts[name], channel_run(config, name))
        for name, kind in channels_of(config).items()
    }
    return partial(_collate, by_channel=collate)


def _collate(rows: Rows, *, by_channel: Mapping[str, Collate]) -> dict[str, Tensor]:
    batch = {
        name + SEPARATOR + key: value
        for name, collate in by_channel.items()
        for key, value in collate([own_row(row, name) for row in rows]).items()
        if key not in SCALARS
    }
    return batch | scalars_of(rows)


def own_row(row: Mapping[str, Any], channel: str) -> dict[str, Any]:
    """What a row has of one channel, and the numbers that key its augmentation."""
    prefix = channel + SEPARATOR
    own = {n.removeprefix(prefix): value for n, value in row.items() if n.startswith(prefix)}
    return own | {name: row[name] for name in ("sample_id", "mask_step") if name in row}


def _own_rows(rows: "Dataset", channel: str) -> "Dataset":
    prefix = channel + SEPARATOR
    names = [name for name in rows.column_names if name.startswith(prefix)]
    own = rows.select_columns(names)
    return own.rename_columns({name: name.removeprefix(prefix) for name in names})


def channel_problems(
    rows: "Dataset", source: DataSource, label_names: LabelNames, config: RunConfig
) -> Iterator[str]:
    """What is wrong with the columns of the channels, channel by channel, and with the labels."""
    for name, kind in channels_of(config).items():
        own = _own_source(source, config, name)
        for problem in kind.problems(rows, own, None):
            yield f"channel {name}: {problem}"
    if label_names is not None:
        yield from label_problems(rows, source.label_column_name, label_names)


def judge_channels(row: Mapping[str, Any], config: RunConfig) -> None:
    """Refuses a row of which one image or clip cannot be used."""
    for name, kind in channels_of(config).items():
        if kind.judge is not None:
            try:
                kind.judge(own_row(row, name), config)
            except BadSample as error:
                raise BadSample(f"channel {name}: {error}") from None


def channel_example(hf_config: Any, batch_size: int, length: int, device: str) -> dict[str, Tensor]:
    """Inputs of every encoder, to trace a forward pass with."""
    return {
        name + SEPARATOR + key: value
        for name, modality in hf_config.channels.items()
        for key, value in KINDS[modality]
        .example(hf_config.of_channel(name), batch_size, length, device)
        .items()
    }


def channel_lengths(rows: "Dataset", config: RunConfig) -> list[int]:
    """By the channel whose rows differ most in what they cost: audio, else all tokens."""
    kinds = channels_of(config)
    by_channel = {
        name: kind.lengths(_own_rows(rows, name))
        for name, kind in kinds.items()
        if kind.lengths is not None
    }
    audio = [lengths for name, lengths in by_channel.items() if kinds[name].part == "audio"]
    counted = audio or list(by_channel.values()) or [[1] * len(rows)]
    return [sum(lengths) for lengths in zip(*counted, strict=True)]


def described_channels(
    rows: "Dataset", processor: ChannelProcessor, config: RunConfig
) -> "dict[str, pa.Array]":
    """`text`; every channel under its name, for a replay; what its modality says, such as
    `photo_brightness`."""
    import pyarrow as pa

    found = {"text": pa.array(rows["text"][:], pa.string())}
    for name, kind in channels_of(config).items():
        said = kind.described(_with_text(_own_rows(rows, name)), processor.parts[name])
        own = "text" if kind.part == "input_ids" else kind.part
        found[name] = said[own]
        found |= {f"{name}_{n}": said[n] for n in said if n not in ("text", kind.part)}
    return found


def described_names(config: RunConfig) -> tuple[str, ...]:
    """The columns that `described_channels` gives."""
    names = dict.fromkeys(["text", *config.model.channels])
    for name, kind in channels_of(config).items():
        names |= {f"{name}_{n}": None for n in kind.described_names if n not in ("text", kind.part)}
    return tuple(names)


def _with_text(rows: "Dataset") -> "Dataset":
    has_text = "text" in rows.column_names
    return rows if has_text else rows.add_column("text", [""] * len(rows))


def _notes(processor: ChannelProcessor, config: RunConfig) -> list[str]:
    return [
        f"channel {name}: {note}"
        for name, kind in channels_of(config).items()
        for note in kind.notes(processor.parts[name])
    ]


def _columns(source: DataSource) -> dict[str, str]:
    names = source.channel_column_names
    return {f"channel_column_names.{name}": column for name, column in names.items()}


def _of_run(modality: Modality, config: RunConfig) -> Modality:
    """What a row holds follows from the channels of the run's model."""
    return replace(
        modality,
        channels=tuple(config.model.channels),
        problems=partial(channel_problems, config=config),
        lengths=partial(channel_lengths, config=config),
        described=partial(described_channels, config=config),
        described_names=described_names(config),
        notes=partial(_notes, config=config),
    )


MULTIMODAL_CLASSIFICATION = register(
    Modality(
        task="multimodal-classification",
        auto_class="AutoModelForSequenceClassification",
        predicts="classes",
        metric_names=("loss", "accuracy", "ece"),
        one_sample_a_row=True,
        needs_labels=True,
        inputs=_columns,
        label_names=lambda rows, source: label_names_of(rows, source.label_column_name),
        problems=lambda rows, source, names: iter(()),
        load_processor=load_processors,
        fit=fit_channels,
        prepare=prepare_channels,
        collator=collator,
        example=channel_example,
        lengths=lambda rows: [1] * len(rows),
        judge=judge_channels,
        described=lambda rows, processor: {},
        described_names=("text",),
        loss=losses.classification_loss,
        eval_sums=losses.classification_sums,
        eval_metrics=losses.classification_metrics,
        notes=lambda processor: [],
        of_run=_of_run,
    )
)
