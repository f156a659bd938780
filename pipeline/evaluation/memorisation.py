"""Memorisation: how often the model, given the start of a training row, goes on as the row does.

Carlini et al., "Quantifying Memorization Across Neural Language Models", ICLR 2023: greedy
continuations of training prompts, beside those of rows never trained on, which any good model of
the language repeats now and then. Canaries tell it without that doubt.
"""

import math
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.canaries import canaries, without_canaries
from pipeline.config.schema import MemorisationConfig, RunConfig
from pipeline.errors import DataError
from pipeline.evaluation.forward import logits_of
from pipeline.evaluation.generation import Decoding, Generator, Rows
from pipeline.modality.bundle import kept_numbers

if TYPE_CHECKING:
    from datasets import Dataset

Pair = tuple[list[int], list[int]]
NUM_REFERENCES = 200
"""Canaries never planted, among which the planted ones are ranked."""


def memorisation_section(
    model: nn.Module, train: "Dataset", held_out: "Dataset", config: RunConfig, tokenizer: Any
) -> dict[str, Any]:
    """Shares of prompts whose continuation is repeated, and what became of the canaries.

    Args:
        model: in eval mode, without dropout.
        train: prepared rows that it was trained on, canaries among them.
        held_out: prepared rows that it was not trained on.
        config: with `evaluation.memorisation`.
        tokenizer: the model's.

    Raises:
        DataError: no row is long enough.
    """
    settings = config.evaluation.memorisation
    assert settings is not None
    generator = Generator(model, None, tokenizer, config.seed)
    level, size = config.evaluation.confidence_level, config.evaluation.batch_size
    pairs = {
        "train": _pairs(without_canaries(train), settings, "training"),
        "control": _pairs(held_out, settings, "test"),
    }
    section: dict[str, Any] = {"settings": settings.model_dump()}
    section |= {
        name: _share(num_repeated(generator, found, settings, size), len(found), level)
        for name, found in pairs.items()
    }
    section["p_value"] = _p_value(section["train"], section["control"])
    if config.data.canaries is not None:
        section["canaries"] = _canaries(generator, config, settings)
    return section


def num_repeated(
    generator: Generator, pairs: Sequence[Pair], settings: MemorisationConfig, batch_size: int
) -> int:
    """Prompts whose greedy continuation has a run of k tokens of what really followed."""
    count = 0
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        prompts = torch.tensor([prompt for prompt, _ in some])
        said = greedy(generator, prompts, settings.continuation_tokens)
        runs = [longest_run(one, rest) for one, (_, rest) in zip(said, some, strict=True)]
        count += sum(run >= settings.k for run in runs)
    return count


def greedy(generator: Generator, prompts: Tensor, num_tokens: int) -> list[list[int]]:
    """The likeliest next token, again and again, behind end tokens too: B lists of num_tokens.

    Args:
        generator: of a model whose dropout is off.
        prompts: int64 [B, P], without padding.
        num_tokens: to go on by.
    """
    tokens = prompts.to(next(generator.model.parameters()).device)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    rows = Rows(torch.arange(len(tokens), device=tokens.device))
    said = generator.generate(given, rows, Decoding(num_tokens, ends=False))
    return [list(one.tokens) for one in said]


def longest_run(first: list[int], second: list[int]) -> int:
    """Length of the longest run of tokens that both have."""
    return SequenceMatcher(None, first, second, autojunk=False).find_longest_match().size


def exposure(losses: Tensor, references: Tensor) -> Tensor:
    """log2(N + 1) - log2(rank) of each loss among N references: 1.44 on average without memory."""
    ranks = 1 + (references[None, :] <= losses[:, None]).sum(1)
    return math.log2(len(references) + 1) - ranks.double().log2()


def _pairs(rows: "Dataset", settings: MemorisationConfig, split: str) -> list[Pair]:
    """Prompts chosen by key, and what follows them."""
    size, needed = settings.prompt_tokens, settings.prompt_tokens + settings.k
    tokens = rows["input_ids"][:]
    long = [place for place, row in enumerate(tokens) if len(row) >= needed]
    if not long:
        raise DataError(
            f"evaluation.memorisation asks for prompts of {size} tokens with {settings.k} behind "
            f"them, but no {split} row has {needed}; ask for fewer."
        )
    places = [long[number] for number in kept_numbers(len(long), settings.num_prompts)]
    stop = size + settings.continuation_tokens
    return [(tokens[place][:size], tokens[place][size:stop]) for place in places]


def _share(count: int, total: int, level: float) -> dict[str, Any]:
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(level, method="wilson")
    return {
        "num_prompts": total,
        "num_repeated": count,
        "share": count / total,
        "interval": [float(interval.low), float(interval.high)],
    }


def _p_value(train: dict[str, Any], control: dict[str, Any]) -> float:
    """Fisher's exact test: training rows are repeated no more often than the others."""
    from scipy.stats import fisher_exact

    table = [
        [part["num_repeated"], part["num_prompts"] - part["num_repeated"]]
        for part in (train, control)
    ]
    return float(fisher_exact(table, alternative="greater").pvalue)


def _canaries(
    generator: Generator, config: RunConfig, settings: MemorisationConfig
) -> dict[str, Any]:
    model, tokenizer = generator.model, generator.tokenizer
    known = config.data.canaries
    assert known is not None
    others = known.model_copy(update={"num_canaries": NUM_REFERENCES})
    there = canaries(config.seed, known, tokenizer, 0)
    never = canaries(config.seed, others, tokenizer, known.num_canaries)
    half, size = known.num_tokens // 2, config.evaluation.batch_size
    asked = settings.model_copy(
        update={"continuation_tokens": half, "k": min(settings.k, known.num_tokens - half)}
    )
    pairs = [(tokens[:half], tokens[half:]) for tokens in there]
    found = exposure(_losses(model, there, size), _losses(model, never, size))
    return {
        "repeats": known.repeats,
        **_share(
            num_repeated(generator, pairs, asked, size),
            len(pairs),
            config.evaluation.confidence_level,
        ),
        "mean_exposure": float(found.mean()),
        "largest_possible_exposure": math.log2(NUM_REFERENCES + 1),
    }


def _losses(model: nn.Module, sequences: Sequence[list[int]], batch_size: int) -> Tensor:
    """Negative log-likelihood of each sequence, [N] float64."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(sequences), batch_size):
        tokens = torch.tensor(sequences[start : start + batch_size], device=device)
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        log_p = logits_of(model, given)[:, :-1].double().log_softmax(-1)
        found.append(-log_p.gather(2, tokens[:, 1:, None]).sum((1, 2)).cpu())
    return torch.cat(found)
