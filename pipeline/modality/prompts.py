"""Where generation starts in a prepared row, and what really followed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.modality.bundle import Prompt


def text_prompt(row: Mapping[str, Any], num_tokens: int) -> Prompt | None:
    """The first tokens of a text; None where nothing follows them."""
    tokens = list(row["input_ids"])
    return _split(row, num_tokens) if len(tokens) > num_tokens else None


def turn_prompt(row: Mapping[str, Any], num_tokens: int) -> Prompt | None:
    """All before the assistant's last turn."""
    learned = list(row["label_mask"])
    last = len(learned) - 1 - learned[::-1].index(1)
    first = last
    while first > 0 and learned[first - 1]:
        first -= 1
    return _split(row, first, last + 1) if first else None


def _split(row: Mapping[str, Any], start: int, stop: int | None = None) -> Prompt:
    tokens = list(row["input_ids"])
    return Prompt({**row, "input_ids": tokens[:start]}, tokens[start:stop])


def prompt_collator(
    tokenizer: Any, config: RunConfig
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Rows of prompts to `input_ids` and `attention_mask`, padded on the left."""
    filler = tokenizer.pad_token_id or 0

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = [[filler] * (width - len(row["input_ids"])) + row["input_ids"] for row in rows]
        masks = [
            [0] * (width - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows
        ]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}

    return collate
