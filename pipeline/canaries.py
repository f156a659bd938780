"""Canaries: sequences of random tokens planted in the training rows, which only memory can repeat.

Carlini et al., "The Secret Sharer", USENIX Security 2019. A canary is a function of the seed and
its number, so that evaluation knows the planted ones, and others that were not planted.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.schema import CanaryConfig, RunConfig
from pipeline.dropout.schedules import NO_DOMAIN
from pipeline.modality.draws import uniform

if TYPE_CHECKING:
    from datasets import Dataset

FIRST_ID = 2**40
"""Sample id of the first canary: beyond those of rows, and the same under every limit."""


def planted(rows: "Dataset", config: RunConfig, tokenizer: Any) -> "Dataset":
    """Training rows, and behind them the canaries of the run, each as often as it asks for."""
    from datasets import Dataset, concatenate_datasets

    settings = config.data.canaries
    if settings is None:
        return rows
    numbers = [number for number in range(settings.num_canaries) for _ in range(settings.repeats)]
    tokens = canaries(config.seed, settings, tokenizer, 0)
    filled = {
        "text": [f"canary {number}" for number in numbers],
        "sample_id": [FIRST_ID + place for place in range(len(numbers))],
        "input_ids": [tokens[number] for number in numbers],
        "label_mask": [[1] * settings.num_tokens] * len(numbers),
        "fault": [""] * len(numbers),
        "domain": [NO_DOMAIN] * len(numbers),
    }
    columns = {name: filled[name] for name in rows.column_names}
    return concatenate_datasets([rows, Dataset.from_dict(columns, features=rows.features)])


def without_canaries(rows: "Dataset") -> "Dataset":
    """The rows that are the user's."""
    ids = rows["sample_id"][:]
    if max(ids, default=0) < FIRST_ID:
        return rows
    return rows.select([place for place, one in enumerate(ids) if one < FIRST_ID])


def canaries(seed: int, settings: CanaryConfig, tokenizer: Any, first: int) -> list[list[int]]:
    """Tokens of `num_canaries` canaries from number `first` on; no special token is among them."""
    special = set(tokenizer.all_special_ids)
    usable = np.array([token for token in range(len(tokenizer)) if token not in special])
    numbers = list(range(first, first + settings.num_canaries))
    drawn = uniform(seed, 0, "canary", numbers, settings.num_tokens)
    chosen: list[list[int]] = usable[(drawn * len(usable)).astype(np.int64)].tolist()
    return chosen
