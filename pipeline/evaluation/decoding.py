"""Tokens sampled by key: draw d of a sample is the same sequence in any batch, on any machine.

Gumbel-max: argmax of log p + g, with g independent and Gumbel distributed, is a draw from p
(Gumbel, 1954; Maddison, Tarlow & Minka, "A* Sampling", NeurIPS 2014). The noise follows from seed,
draw, sample, place and token by purpose `decode` of the mask specification: no mask changes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from pipeline.dropout.key import derive_key
from pipeline.dropout.philox import philox_words

_WORDS = 4
_HALF = 0.5  # numbers lie in the middles of 2**32 equal parts: never 0, never 1


def gumbel(
    seed: int, draw: int, sample_ids: Sequence[int], place: int, num_tokens: int
) -> NDArray[np.float64]:
    """Gumbel noise for every token of the vocabulary, [B, num_tokens].

    Args:
        seed: the run's.
        draw: number of the sequence, of those drawn for a sample.
        sample_ids: of the B rows.
        place: of the token in the continuation, from 0.
        num_tokens: size of the vocabulary; token v reads word v % 4 of counter (v // 4, place).
    """
    key = derive_key(seed, "decode", draw, "gumbel", "token", 0)
    blocks = np.arange(-(-num_tokens // _WORDS))[None, :]
    ids = np.asarray(sample_ids, dtype=np.uint64)[:, None]
    words = philox_words(key, blocks, place, ids).reshape(len(ids), -1)[:, :num_tokens]
    return -np.log(-np.log((words.astype(np.float64) + _HALF) / 2**32))


class KeyedGumbel(LogitsProcessor):
    """Adds keyed noise, so that the likeliest token of what is left is a sampled one.

    Args:
        seed: the run's.
        draw: number of the sequence.
        sample_ids: of the rows that are generated, without beams.
        temperature: the logits are divided by it first.
    """

    def __init__(self, seed: int, draw: int, sample_ids: list[int], temperature: float) -> None:
        self.seed, self.draw, self.sample_ids = seed, draw, sample_ids
        self.temperature = temperature
        self._prompt_length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores [B, V] of the next token, with noise."""
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1]
        place = input_ids.shape[1] - self._prompt_length
        noise = gumbel(self.seed, self.draw, self.sample_ids, place, scores.shape[1])
        return scores.double() / self.temperature + torch.from_numpy(noise).to(scores.device)
