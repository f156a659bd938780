"""Images with text: image-text-to-text, conversations about one image, loss on the assistant's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.config.schema import DataSource, RunConfig
from pipeline.errors import ModelError
from pipeline.modality import chat, language, vision
from pipeline.modality.bundle import LabelNames, kept_rows, register
from pipeline.modality.chat_template import Conversation, require_template
from pipeline.modality.files import file_problems
from pipeline.modality.image_text_processor import (
    AUTO_CLASS,
    fit_image_text,
    freeze_unread,
    image_text_example,
    image_tokens,
    load_image_text_processor,
)
from pipeline.modality.images import decode_image
from pipeline.modality.prompts import prompt_collator, turn_prompt
from pipeline.modality.quarantine import BadSample

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

IMAGE = vision.IMAGE
Rows = list[dict[str, Any]]


def columns_of(source: DataSource) -> dict[str, str]:
    """The image, and what is said about it."""
    return {"image_column_name": source.image_column_name} | chat.columns_of(source)


def image_chat_problems(
    rows: "Dataset", source: DataSource, label_names: LabelNames
) -> Iterator[str]:
    """A column that holds no images; each way in which rows are no conversations."""
    from datasets import Image

    yield from file_problems(rows, source.image_column_name, Image, "images", source, None)
    texts = rows.remove_columns(source.image_column_name)  # else all images are decoded
    yield from chat.conversation_problems(texts, source, None)


def prepare_image_chats(
    rows: "Dataset",
    source: DataSource,
    config: RunConfig,
    processor: Any,
    label_names: LabelNames,
    *,
    max_samples: int | None = None,
) -> "Dataset":
    """One sample a row: what conversations have, the tokens of the image among `input_ids`, and
    `image`, still encoded.

    Raises:
        ModelError: the processor has no chat template, and rows are not plain text.
    """
    from datasets import Image, concatenate_datasets

    if not chat.is_plain(rows, source):
        require_template(processor.tokenizer)
    kept, numbers = kept_rows(rows, max_samples)
    column = source.image_column_name
    kept = kept.cast_column(column, Image(decode=False))
    writer = _Writer(processor, source, config.data.max_length)

    def encode(batch: dict[str, list[Any]], places: list[int]) -> dict[str, Any]:
        found = [writer.row({n: v[one] for n, v in batch.items()}) for one in range(len(places))]
        columns = {name: [row[name] for row in found] for name in found[0]}
        return {**columns, "sample_id": [numbers[place] for place in places]}

    texts = language.mapped(kept, encode)
    images = kept.select_columns([column]).rename_columns({column: IMAGE})
    return concatenate_datasets([texts, images], axis=1)


class _Writer:
    """Rows to tokens; how many an image takes is asked once for each size of image."""

    def __init__(self, processor: Any, source: DataSource, longest: int) -> None:
        self.processor, self.source, self.longest = processor, source, longest
        self._by_size: dict[tuple[int, int], list[int]] = {}

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """`text`, `input_ids`, `label_mask`, `fault`."""
        tokenizer = self.processor.tokenizer
        try:
            size = decode_image(row[self.source.image_column_name]).size
            tokens, mask = chat.written(self._conversation(row), tokenizer)
            tokens, mask = _with_start(tokenizer, tokens, mask)
            text = tokenizer.decode(tokens)
            tokens, mask = self._with_image(tokens, mask, size)
            return {"text": text, **chat.cut(tokens, mask, self.longest)}
        except BadSample as error:
            return {"text": "", **chat.refused(error)}

    def _conversation(self, row: dict[str, Any]) -> Conversation | tuple[str, str]:
        """With a place for the image: its own, or before all that the user says first."""
        found = chat.conversation_of(row, self.source)
        if isinstance(found, tuple):
            if not self.processor.chat_template:
                return f"{self.processor.image_token}\n{found[0]}", found[1]
            turns = [{"role": "user", "content": found[0]}]
            turns += [{"role": "assistant", "content": found[1]}]
            found = Conversation(turns, 1)
        messages = [{**one, "content": _parts(one.get("content"))} for one in found.messages]
        if not self._has_place(messages):
            first = next((one for one in messages if one["role"] == "user"), messages[0])
            first["content"] = [{"type": "image"}, *first["content"]]
        return replace(found, messages=messages)

    def _has_place(self, messages: Sequence[dict[str, Any]]) -> bool:
        parts = [part for message in messages for part in message["content"]]
        is_written = any(self.processor.image_token in part.get("text", "") for part in parts)
        return is_written or any(part["type"] == "image" for part in parts)

    def _with_image(
        self, tokens: list[int], mask: list[int], size: tuple[int, int]
    ) -> tuple[list[int], list[int]]:
        token = self.processor.image_token_id
        if (places := tokens.count(token)) != 1:
            raise BadSample(f"it has {places} places for images, and there is one image")
        if size not in self._by_size:
            self._by_size[size] = image_tokens(self.processor, size)
        at, image = tokens.index(token), self._by_size[size]
        if at + len(image) > self.longest:
            raise BadSample(
                f"its image ends at token {at + len(image)}, beyond the {self.longest} that "
                "data.max_length keeps"
            )
        return (
            [*tokens[:at], *image, *tokens[at + 1 :]],
            [*mask[:at], *[0] * len(image), *mask[at + 1 :]],
        )


def _parts(content: Any) -> list[dict[str, Any]]:
    """Content as parts of text and image; where the image is (a path, a URL) the column says."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content or ""}]
    known = {"image", "text"}
    if odd := {str(part.get("type")) for part in content} - known:
        raise BadSample(f"a message has parts of the type {', '.join(sorted(odd))}")
    return [
        {"type": "image"}
        if part["type"] == "image"
        else {"type": "text", "text": part.get("text", "")}
        for part in content
    ]


def _with_start(tokenizer: Any, tokens: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """The start token before all, where the tokenizer writes one and the template does not."""
    start = tokenizer.bos_token_id
    if start is None or tokenizer("")["input_ids"][:1] != [start] or tokens[:1] == [start]:
        return tokens, mask
    return [start, *tokens], [0, *mask]


# -- batches -------------------------------------------------------------------------------------


def collator(processor: Any, config: RunConfig) -> Callable[[Rows], dict[str, Tensor]]:
    """Rows to padded tokens with their labels, and `pixel_values` of one image a row."""
    collate = language.collator(processor.tokenizer, config, causal=True)
    return _ImageCollator(collate, processor, config)


def image_prompt_collator(processor: Any, config: RunConfig) -> Callable[[Rows], dict[str, Tensor]]:
    """The same of prompts, padded on the left, without labels."""
    return _ImageCollator(prompt_collator(processor.tokenizer, config), processor, config)


class _ImageCollator:
    def __init__(self, collate: Callable[[Rows], Any], processor: Any, config: RunConfig) -> None:
        self.collate, self.processor, self.config = collate, processor, config

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        pixels = vision.pixels_of(rows, self.processor.image_processor, self.config)
        if pixels.dim() != 4 or len(pixels) != len(rows):
            raise ModelError(
                f"The image processor makes a tensor of shape {list(pixels.shape)} of {len(rows)} "
                "images: pieces of images belong to no sample. Choose a model that takes an image "
                "as one tensor, such as llava-hf/llava-1.5-7b-hf."
            )
        batch: dict[str, Tensor] = self.collate(rows)
        return batch | {"pixel_values": pixels}


def described_image_chats(rows: "Dataset", processor: Any) -> "dict[str, pa.Array]":
    """What conversations say of themselves, and images."""
    images = vision.described_images(rows, processor.image_processor)
    return images | chat.described_conversations(rows, processor.tokenizer)


def image_chat_notes(processor: Any) -> list[str]:
    """How rows are padded, where that is not the tokenizer's own way."""
    return language.classification_notes(processor.tokenizer)


IMAGE_CHAT = register(
    replace(
        chat.CHAT,
        task="image-text-to-text",
        auto_class=AUTO_CLASS,
        inputs=columns_of,
        load_processor=load_image_text_processor,
        fit=fit_image_text,
        example=image_text_example,
        problems=image_chat_problems,
        prepare=prepare_image_chats,
        collator=collator,
        described=described_image_chats,
        described_names=(
            *chat.CHAT.described_names,
            *(name for name in vision.IMAGE_CLASSIFICATION.described_names if name != "text"),
        ),
        notes=image_chat_notes,
        freeze=freeze_unread,
        prompt=turn_prompt,
        prompt_collator=image_prompt_collator,
    )
)
