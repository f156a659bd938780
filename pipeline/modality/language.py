"""Language: text-classification, and plain-text text-generation in blocks. Losses: `losses.py`."""

from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.config.schema import DataSource, RunConfig
from pipeline.errors import ModelError
from pipeline.modality import bundle, losses
from pipeline.modality.bundle import LabelNames, Modality, kept_numbers, kept_rows, register
from pipeline.modality.labels import label_names_of, label_numbers, label_problems, row_list
from pipeline.modality.prompts import prompt_collator, text_prompt
from pipeline.modality.tokenizer import fit_to_tokenizer, load_tokenizer, token_example

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

PAD_MULTIPLE = 8  # widths that tensor cores and vector units like
IN_MEMORY_BYTES = 2**30
PADDING = -1  # in packed rows, the sample_id of what belongs to no document
TEXT_COLUMNS = ("text", "num_tokens", "unknown_token_share")
SCALARS = ("labels", "sample_id", "domain", "mask_step")  # one number a row


def prepare_classification(
    rows: "Dataset",
    source: DataSource,
    config: RunConfig,
    processor: Any,
    label_names: LabelNames,
    *,
    max_samples: int | None = None,
) -> "Dataset":
    """One sample a row, cut to max_length; `sample_id` is the row number."""
    kept, numbers = kept_rows(rows, max_samples)
    labels = label_names and label_numbers(kept, source.label_column_name, label_names)

    def encode(batch: dict[str, list[Any]], places: list[int]) -> dict[str, Any]:
        texts = batch[source.text_column_name]
        inputs = processor(texts, truncation=True, max_length=config.data.max_length)
        columns = {"text": texts, "sample_id": [numbers[place] for place in places]}
        if labels is not None:
            columns["labels"] = [labels[place] for place in places]
        return columns | dict(inputs)

    return mapped(kept, encode)


def prepare_blocks(
    rows: "Dataset",
    source: DataSource,
    config: RunConfig,
    processor: Any,
    label_names: LabelNames,
    *,
    max_samples: int | None = None,
) -> "Dataset":
    """Documents, each closed by the end token, joined and cut into blocks that `sample_id` counts.

    With `data.packing` nothing is joined: a document is a sample, a longer one than max_length
    several (`pipeline/packing.py` puts them into rows for training).

    The last, shorter block is kept if it predicts anything (two tokens or more). Blank rows are
    passed over: files of lines use them as separators. `text` is the decoded block.
    """
    from datasets import Dataset

    if config.data.packing:
        return _prepare_documents(rows, source, config, processor, max_samples)
    stream = array("q")  # 8 bytes a token: a billion tokens fit a workstation
    for document in _documents(rows, source.text_column_name, processor):
        stream.extend(document)
    size = config.data.max_length
    starts = range(0, len(stream) - 1, size)  # a last block of one token would predict nothing
    numbers = kept_numbers(len(starts), max_samples)
    blocks = [stream[starts[number] : starts[number] + size].tolist() for number in numbers]
    texts = processor.batch_decode(blocks)
    return Dataset.from_dict({"text": texts, "sample_id": numbers, "input_ids": blocks})


def _prepare_documents(
    rows: "Dataset", source: DataSource, config: RunConfig, tokenizer: Any, limit: int | None
) -> "Dataset":
    from datasets import Dataset

    size = config.data.max_length
    pieces = [
        document[start : start + size]
        for document in _documents(rows, source.text_column_name, tokenizer)
        for start in range(0, len(document) - 1, size)  # one token alone would predict nothing
    ]
    numbers = kept_numbers(len(pieces), limit)
    kept = [pieces[number] for number in numbers]
    texts = tokenizer.batch_decode(kept)
    return Dataset.from_dict({"text": texts, "sample_id": numbers, "input_ids": kept})


def collator(
    tokenizer: Any, config: RunConfig, *, causal: bool
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Pads to the longest row, up to a multiple of 8 within max_length, on the tokenizer's side."""
    give_padding_token(tokenizer)
    return partial(
        _collate,
        padding=_padding_values(tokenizer),
        left=tokenizer.padding_side == "left",
        longest=config.data.max_length,
        causal=causal,
    )


def give_padding_token(tokenizer: Any) -> str | None:
    """Where there is none the end token pads: masked out, and never a label. Returns a note."""
    if tokenizer.pad_token_id is not None:
        return None
    if tokenizer.eos_token is None:
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path or '(unnamed)'} has neither a padding nor an "
            "end token, so rows of different length cannot share a batch. Set pad_token in its "
            "tokenizer_config.json, or name another one with model.tokenizer_name_or_path."
        )
    tokenizer.pad_token = tokenizer.eos_token
    return (
        f"the tokenizer has no padding token: its end token {tokenizer.eos_token!r} pads, "
        "masked out of attention and loss"
    )


def classification_problems(
    rows: "Dataset", source: DataSource, label_names: LabelNames
) -> Iterator[str]:
    """Blank texts, and with label names everything wrong with the labels."""
    column = source.text_column_name
    if not _is_text(rows, column):
        yield _not_text(rows, column)
    elif blank := _blank_rows(rows, column):
        yield f"column {column!r} has no text in {row_list(blank)}; fill them or leave them out"
    if label_names is not None:
        yield from label_problems(rows, source.label_column_name, label_names)


def generation_problems(
    rows: "Dataset", source: DataSource, label_names: LabelNames
) -> Iterator[str]:
    """Only a split without any text: blank lines are passed over."""
    column = source.text_column_name
    if not _is_text(rows, column):
        yield _not_text(rows, column)
    elif len(_blank_rows(rows, column)) == len(rows):
        yield f"column {column!r} has no text in any of the {len(rows)} rows"


def _documents(rows: "Dataset", column: str, tokenizer: Any) -> Iterator[list[int]]:
    end = tokenizer.eos_token_id
    for batch in rows.select_columns([column]).iter(batch_size=1000):
        texts = [text for text in batch[column] if text and text.strip()]
        if texts:
            # verbose=False: a document longer than the model is no fault, it is cut into blocks.
            for ids in tokenizer(texts, verbose=False)["input_ids"]:
                yield ids if end is None or ids[-1:] == [end] else [*ids, end]


def _collate(
    features: list[dict[str, Any]],
    *,
    padding: dict[str, int],
    left: bool,
    longest: int,
    causal: bool,
) -> dict[str, Tensor]:
    longest_row = max(len(row["input_ids"]) for row in features)
    width = max(longest_row, min(-(-longest_row // PAD_MULTIPLE) * PAD_MULTIPLE, longest))

    def pad(values: list[int], filler: int) -> list[int]:
        fill = [filler] * (width - len(values))
        return fill + values if left else values + fill

    def column(name: str) -> list[list[int]]:
        return [row.get(name) or [1] * len(row["input_ids"]) for row in features]

    present = [name for name in padding if name in features[0] or name == "attention_mask"]
    batch = {name: [pad(row, padding[name]) for row in column(name)] for name in present}
    if causal:
        batch["labels"] = [pad(_next_tokens(row), losses.IGNORED) for row in features]
    scalars = [name for name in SCALARS if name in features[0]]
    if "position_ids" in features[0]:
        scalars.remove("sample_id")
        batch = _as_packed(batch, features, width, left)
    batch |= {name: [row[name] for row in features] for name in scalars}
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in batch.items()}


def _next_tokens(row: dict[str, Any]) -> list[int]:
    """Tokens to predict; of a conversation, those of the assistant.

    Nothing predicts a row's first token: ignored, so that labels count the predicted tokens.
    """
    tokens = row["input_ids"][1:]
    learned = row.get("label_mask", [1] * len(row["input_ids"]))[1:]
    kept = [
        one if is_learned else losses.IGNORED
        for one, is_learned in zip(tokens, learned, strict=True)
    ]
    return [losses.IGNORED, *kept]


def _as_packed(
    batch: dict[str, list[list[int]]], features: list[dict[str, Any]], width: int, left: bool
) -> dict[str, list[list[int]]]:
    """Positions that tell documents apart, in place of an attention mask, which would hide them.

    Padding is one more document, which no other sees. Nothing predicts the first token of any.
    """

    def filled(name: str, filler: list[int]) -> list[list[int]]:
        fills = [filler[: width - len(row[name])] for row in features]
        rows = zip(fills, (row[name] for row in features), strict=True)
        return [fill + row if left else row + fill for fill, row in rows]

    positions = filled("position_ids", list(range(width)))
    labels = [
        [losses.IGNORED if place == 0 else label for label, place in zip(*row, strict=True)]
        for row in zip(batch["labels"], positions, strict=True)
    ]
    given = {name: rows for name, rows in batch.items() if name != "attention_mask"}
    ids = filled("sample_id", [PADDING] * width)
    return given | {"position_ids": positions, "sample_id": ids, "labels": labels}


def _padding_values(tokenizer: Any) -> dict[str, int]:
    known = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return {name: known.get(name, 0) for name in tokenizer.model_input_names}


def _blank_rows(rows: "Dataset", column: str) -> list[int]:
    texts = enumerate(rows[column][:])
    return [row for row, text in texts if text is None or not text.strip()]


def _is_text(rows: "Dataset", column: str) -> bool:
    return getattr(rows.features[column], "dtype", None) in ("string", "large_string", "null")


def _not_text(rows: "Dataset", column: str) -> str:
    return f"column {column!r} holds {rows.features[column]}, not text; name another column"


def mapped(rows: "Dataset", encode: Callable[..., dict[str, Any]]) -> "Dataset":
    """Rows encoded: in memory, or in the Hugging Face cache; never beside the user's files."""
    from datasets import config

    small = rows.data.nbytes < IN_MEMORY_BYTES
    cache = Path(config.HF_DATASETS_CACHE) / "masklock"
    if not small:
        cache.mkdir(parents=True, exist_ok=True)
    return rows.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        keep_in_memory=small,
        load_from_cache_file=False,
        cache_file_name=None if small else str(cache / f"{rows._fingerprint}.arrow"),
        new_fingerprint=rows._fingerprint,  # else the tokenizer is pickled and hashed
    )


def classification_notes(tokenizer: Any) -> list[str]:
    """How rows are padded, where that is not the tokenizer's own way."""
    note = give_padding_token(tokenizer)
    return [note] if note else []


def generation_notes(tokenizer: Any) -> list[str]:
    """The same, and how documents are parted."""
    notes = classification_notes(tokenizer)
    if tokenizer.eos_token is None:
        notes.append("the tokenizer has no end token: documents are joined without one")
    return notes


def _text_column(source: DataSource) -> dict[str, str]:
    return {"text_column_name": source.text_column_name}


def tokenizer_of_rows(config: RunConfig, rows: "Dataset | None" = None) -> Any:
    """The model's tokenizer, or one trained on the text of these rows."""
    return load_tokenizer(config, [] if rows is None else rows[config.data.text_column_name])


def unknown_token(tokenizer: Any) -> int | None:
    """The token that stands for what the vocabulary lacks.

    Byte-level tokenizers lack nothing; some of them call their end token so.
    """
    found: int | None = tokenizer.unk_token_id
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if found in ends else found


def _unknown_shares(tokens: list[list[int]], unknown: int | None) -> list[float]:
    if unknown is None:
        return [0.0] * len(tokens)
    return [list(row).count(unknown) / len(row) for row in tokens]


def described_text(rows: "Dataset", tokenizer: Any) -> "dict[str, pa.Array]":
    """`text`, `num_tokens`, `unknown_token_share`."""
    import pyarrow as pa

    tokens = rows["input_ids"][:]
    return {
        "text": pa.array(rows["text"][:], pa.string()),
        "num_tokens": pa.array([len(row) for row in tokens], pa.int64()),
        "unknown_token_share": pa.array(_unknown_shares(tokens, unknown_token(tokenizer))),
    }


def described_blocks(rows: "Dataset", tokenizer: Any) -> "dict[str, pa.Array]":
    """The same, and `input_ids`: a block cannot be made again of its text alone."""
    import pyarrow as pa

    tokens = pa.array(rows["input_ids"][:], pa.list_(pa.int32()))
    return described_text(rows, tokenizer) | {"input_ids": tokens}


def token_lengths(rows: "Dataset") -> list[int]:
    """Tokens of each sample."""
    return [len(ids) for ids in rows["input_ids"][:]]


TEXT_CLASSIFICATION = register(
    Modality(
        task="text-classification",
        auto_class="AutoModelForSequenceClassification",
        predicts="classes",
        metric_names=("loss", "accuracy", "ece"),
        one_sample_a_row=True,
        needs_labels=True,
        inputs=_text_column,
        load_processor=tokenizer_of_rows,
        fit=fit_to_tokenizer,
        example=token_example,
        lengths=token_lengths,
        judge=None,
        described=described_text,
        described_names=TEXT_COLUMNS,
        label_names=lambda rows, source: label_names_of(rows, source.label_column_name),
        problems=classification_problems,
        prepare=prepare_classification,
        collator=partial(collator, causal=False),
        loss=losses.classification_loss,
        eval_sums=losses.classification_sums,
        eval_metrics=losses.classification_metrics,
        notes=classification_notes,
    )
)

TEXT_GENERATION = register(
    Modality(
        task="text-generation",
        auto_class="AutoModelForCausalLM",
        predicts="next_tokens",
        metric_names=("loss", "perplexity", "accuracy"),
        one_sample_a_row=False,
        needs_labels=False,
        inputs=_text_column,
        load_processor=tokenizer_of_rows,
        fit=fit_to_tokenizer,
        example=token_example,
        lengths=token_lengths,
        judge=None,
        described=described_blocks,
        described_names=(*TEXT_COLUMNS, "input_ids"),
        label_names=lambda rows, source: None,
        problems=generation_problems,
        prepare=prepare_blocks,
        collator=partial(collator, causal=True),
        loss=losses.causal_loss,
        eval_sums=losses.causal_sums,
        eval_metrics=losses.causal_metrics,
        notes=generation_notes,
        of_run=bundle.of_rows,
        prompt=text_prompt,
        prompt_collator=prompt_collator,
    )
)
