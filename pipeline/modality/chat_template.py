"""Conversations to tokens by the tokenizer's chat template, and which of them are learned.

A template that marks the assistant by `{% generation %}` says it itself. Otherwise growing parts
of the conversation are tokenised, and each must begin the next: else nobody knows where a turn is.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from pipeline.errors import ModelError
from pipeline.modality.quarantine import BadSample

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages, the first of which may be given: of the others the assistant's are learned."""

    messages: Sequence[Message]
    num_given: int = 0
    tools: Sequence[Any] | None = None


def give_template(tokenizer: Any, file: str | None) -> None:
    """Set the template of a file, if one is named.

    Raises:
        ModelError: the file cannot be read.
    """
    if file is not None:
        try:
            tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ModelError(f"data.chat_template: {file} cannot be read: {error}") from error


def require_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot write conversations.

    Raises:
        ModelError: it has no template.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path or '(trained here)'} has no chat template, so "
            "conversations cannot be written as its model expects them. Name the instruct or chat "
            "version of the model, or a template with data.chat_template=FILE "
            "(configs/language/chatml.jinja is one); plain text needs none: give prompts and "
            "completions as text."
        )


def tokens_of(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and 1 for each that is learned.

    Raises:
        BadSample: the template refuses it, or does not tell which tokens are the assistant's.
    """
    try:
        template = tokenizer.get_chat_template(None, conversation.tools)
        if MARKS.search(template) and tokenizer.is_fast:
            return _marked(tokenizer, conversation)
        return _by_prefixes(tokenizer, conversation)
    except (TemplateError, ValueError, TypeError) as error:
        raise BadSample(f"the chat template refuses it: {error}") from error


def tokens_of_text(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Prompt and completion tokenised apart, as generation meets them, and the end token."""
    end = tokenizer.eos_token_id
    given = _without_end(tokenizer(prompt, verbose=False)["input_ids"], end)
    learned = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    learned = learned if end is None else [*_without_end(learned, end), end]
    return given + learned, [0] * len(given) + [1] * len(learned)


def without_none(value: Any) -> Any:
    """Tables give every message every field that one has; templates must not see the empty ones."""
    if isinstance(value, dict):
        return {name: without_none(one) for name, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def from_json(value: Any) -> Any:
    """A list as it is, or written as JSON; None where it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def _marked(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(
        conversation.messages,
        tools=conversation.tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    tokens, mask = list(found["input_ids"]), list(found["assistant_masks"])
    if conversation.num_given:
        given = _rendered(tokenizer, conversation, conversation.num_given)
        _require_begins(given, tokens, conversation.num_given)
        mask[: len(given)] = [0] * len(given)
    return tokens, mask


def _by_prefixes(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    messages, total = conversation.messages, len(conversation.messages)
    tokens = _rendered(tokenizer, conversation, total)
    mask = [0] * len(tokens)
    for turn in range(conversation.num_given, total):
        if messages[turn]["role"] != "assistant":
            continue
        if turn == 0:
            raise BadSample("the assistant speaks first, and the chat template marks no turns")
        start = _rendered(tokenizer, conversation, turn, add_generation_prompt=True)
        stop = _rendered(tokenizer, conversation, turn + 1)
        _require_begins(start, stop, turn)
        _require_begins(stop, tokens, turn + 1)
        mask[len(start) : len(stop)] = [1] * (len(stop) - len(start))
    return tokens, mask


def _rendered(
    tokenizer: Any, conversation: Conversation, num_messages: int, **options: Any
) -> list[int]:
    """Tokens of the first messages."""
    tokens: list[int] = tokenizer.apply_chat_template(
        conversation.messages[:num_messages], tools=conversation.tools, return_dict=False, **options
    )
    return tokens


def _require_begins(part: list[int], whole: list[int], num_messages: int) -> None:
    if whole[: len(part)] != part:
        raise BadSample(
            f"the chat template writes the first {num_messages} messages otherwise alone than with "
            "what follows, and has no {% generation %} marks, so the assistant's tokens cannot be "
            "told; name a template that has them with data.chat_template"
        )


def _without_end(tokens: list[int], end: int | None) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] == end else tokens
