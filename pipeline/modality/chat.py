"""Language: text-generation on conversations, a row each, with loss on what the assistant says."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import DataSource, RunConfig
from pipeline.modality.bundle import CONVERSATIONS, LabelNames, kept_rows, register
from pipeline.modality.chat_template import (
    Conversation,
    from_json,
    give_template,
    require_template,
    tokens_of,
    tokens_of_text,
    without_none,
)
from pipeline.modality.labels import row_list
from pipeline.modality.language import (
    TEXT_GENERATION,
    classification_notes,
    described_blocks,
    mapped,
)
from pipeline.modality.prompts import turn_prompt
from pipeline.modality.quarantine import BadSample
from pipeline.modality.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
FAULT = "fault"
"""Column of prepared rows: why one cannot be used, or nothing."""


def columns_of(source: DataSource) -> dict[str, str]:
    """The columns of conversations, by the configuration's names."""
    names = ("messages", "prompt", "completion", "tools")
    given = {f"{name}_column_name": getattr(source, f"{name}_column_name") for name in names}
    return {key: column for key, column in given.items() if column is not None}


def load_chat_tokenizer(config: RunConfig, rows: "Dataset | None" = None) -> Any:
    """The model's tokenizer, or one trained on what is said; with the run's own template."""
    tokenizer = load_tokenizer(config, [] if rows is None else _words(rows, config.data))
    give_template(tokenizer, config.data.chat_template)
    return tokenizer


def conversation_problems(
    rows: "Dataset", source: DataSource, label_names: LabelNames
) -> Iterator[str]:
    """A sentence for each way in which rows are no conversations, with all rows that are so."""
    found: dict[str, list[int]] = {}
    for row in range(len(rows)):
        for fault in _faults(rows[row], source):
            found.setdefault(fault, []).append(row)
    for fault, at in found.items():
        yield f"{row_list(at)}: {fault}"


def prepare_conversations(
    rows: "Dataset",
    source: DataSource,
    config: RunConfig,
    processor: Any,
    label_names: LabelNames,
    *,
    max_samples: int | None = None,
) -> "Dataset":
    """One sample a row, cut to max_length at its end; `label_mask` is 1 where a token is learned.

    `fault` says why a row cannot be used: `judge` refuses it.

    Raises:
        ModelError: the tokenizer has no chat template, and rows are not plain text.
    """
    if not is_plain(rows, source):
        require_template(processor)
    kept, numbers = kept_rows(rows, max_samples)

    def encode(batch: dict[str, list[Any]], places: list[int]) -> dict[str, Any]:
        columns: dict[str, list[Any]] = {"input_ids": [], "label_mask": [], FAULT: []}
        for number in range(len(places)):
            row = {name: values[number] for name, values in batch.items()}
            for name, value in _encoded(row, source, processor, config.data.max_length).items():
                columns[name].append(value)
        texts = processor.batch_decode(columns["input_ids"])
        return {"text": texts, "sample_id": [numbers[place] for place in places], **columns}

    return mapped(kept, encode)


def judge(sample: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse a conversation that the template refuses, or of which nothing is learned."""
    if sample.get(FAULT):
        raise BadSample(sample[FAULT])


def described_conversations(rows: "Dataset", tokenizer: Any) -> "dict[str, pa.Array]":
    """What blocks say, and which tokens count."""
    import pyarrow as pa

    mask = pa.array(rows["label_mask"][:], pa.list_(pa.int8()))
    return described_blocks(rows, tokenizer) | {"label_mask": mask}


# -- one row -------------------------------------------------------------------------------------


def _encoded(
    row: dict[str, Any], source: DataSource, tokenizer: Any, longest: int
) -> dict[str, Any]:
    try:
        tokens, mask = written(conversation_of(row, source), tokenizer)
        return cut(tokens, mask, longest)
    except BadSample as error:
        return refused(error)


def written(
    conversation: Conversation | tuple[str, str], tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, or of a prompt and its completion, and 1 for each that is learned.

    Raises:
        BadSample: the chat template refuses it.
    """
    if isinstance(conversation, tuple):
        return tokens_of_text(tokenizer, *conversation)
    return tokens_of(tokenizer, conversation)


def cut(tokens: list[int], mask: list[int], longest: int) -> dict[str, Any]:
    """The first tokens, as columns of a prepared row.

    Raises:
        BadSample: there is nothing to learn among them.
    """
    if not any(mask[1:longest]):
        raise BadSample(_nothing_learned(mask, longest))
    return {"input_ids": tokens[:longest], "label_mask": mask[:longest], FAULT: ""}


def refused(error: BadSample) -> dict[str, Any]:
    """The columns of a row that `judge` sets aside."""
    return {"input_ids": [0], "label_mask": [0], FAULT: str(error)}


def _nothing_learned(mask: list[int], longest: int) -> str:
    if not any(mask[1:]):
        return "there is nothing of the assistant to predict"
    return (
        f"its first {longest} of {len(mask)} tokens (data.max_length) hold none of the assistant's"
    )


def conversation_of(row: dict[str, Any], source: DataSource) -> Conversation | tuple[str, str]:
    """The row's conversation; a prompt and its completion where they are plain text."""
    tools = from_json(row[source.tools_column_name]) if source.tools_column_name else None
    tools = without_none(tools) or None
    if source.messages_column_name is not None:
        return Conversation(_messages(row[source.messages_column_name]), 0, tools)
    prompt, completion = _pair(row, source)
    if isinstance(prompt, str):
        return prompt, completion
    return Conversation(_messages(prompt) + _messages(completion), len(prompt), tools)


def _pair(row: dict[str, Any], source: DataSource) -> tuple[Any, Any]:
    assert source.prompt_column_name is not None
    assert source.completion_column_name is not None
    return row[source.prompt_column_name], row[source.completion_column_name]


def _messages(value: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = without_none(from_json(value))
    return messages


def _faults(row: dict[str, Any], source: DataSource) -> Iterator[str]:
    if source.messages_column_name is not None:
        messages = from_json(row[source.messages_column_name])
        yield from _faults_of(messages, source.messages_column_name, ("user", "assistant"))
        return
    prompt, completion = _pair(row, source)
    if isinstance(prompt, list) and isinstance(completion, list):
        yield from _faults_of(prompt, source.prompt_column_name, ("user",))
        yield from _faults_of(completion, source.completion_column_name, ("assistant",))
    elif not isinstance(prompt, str) or not isinstance(completion, str):
        yield "prompt and completion are both text, or both lists of messages"
    elif not prompt.strip() or not completion.strip():
        yield "prompt or completion has no text"


def _faults_of(messages: Any, column: str | None, needed: tuple[str, ...]) -> Iterator[str]:
    if messages is None or not all(isinstance(one, dict) for one in messages):
        yield f"column {column!r} holds no list of messages such as {{role: user, content: ...}}"
        return
    if not messages:
        yield f"column {column!r} holds an empty conversation"
        return
    roles = [one.get("role") for one in messages]
    if odd := sorted({str(role) for role in roles if role not in ROLES}):
        yield f"the role {', '.join(odd)} is unknown; known: {', '.join(ROLES)}"
    elif missing := [role for role in needed if role not in roles]:
        yield f"column {column!r} has no turn of the {' and none of the '.join(missing)}"
    if any(one.get("content") is None and not one.get("tool_calls") for one in messages):
        yield "a message has neither content nor tool_calls"


# -- tokenizers of one's own ---------------------------------------------------------------------


def is_plain(rows: "Dataset", source: DataSource) -> bool:
    """Whether no row is a list of messages."""
    column = source.prompt_column_name
    return column is not None and all(isinstance(value, str) for value in rows[column][:])


def _words(rows: "Dataset", source: DataSource) -> list[str]:
    """What is said in all rows."""
    texts: list[Any] = []
    for row in rows:
        found = conversation_of(row, source)
        if isinstance(found, Conversation):
            texts += [message.get("content") for message in found.messages]
        else:
            texts += found
    return [text for text in texts if isinstance(text, str)]


CHAT = register(
    replace(
        TEXT_GENERATION,
        task=CONVERSATIONS,
        of_run=lambda modality, config: modality,
        one_sample_a_row=True,
        inputs=columns_of,
        load_processor=load_chat_tokenizer,
        judge=judge,
        described=described_conversations,
        described_names=(*TEXT_GENERATION.described_names, "label_mask"),
        problems=conversation_problems,
        prepare=prepare_conversations,
        notes=classification_notes,
        prompt=turn_prompt,
    )
)
