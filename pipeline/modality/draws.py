"""Numbers behind augmentations: functions of seed, step and sample, whoever loads the batch.

Purpose `augment` of the mask specification: the streams of training and Monte-Carlo masks are
others, so that augmenting changes no mask.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.dropout.key import derive_key
from pipeline.dropout.philox import philox_words

WORDS = 4
_CENTRE = 0.5  # numbers lie in the middles of 2**32 equal parts: never 0, never 1


def uniform(
    seed: int, step: int, name: str, sample_ids: list[int], count: int
) -> NDArray[np.float64]:
    """Numbers in (0, 1), [N, count]: one row a sample.

    Args:
        seed: the run's.
        step: of training; all micro-batches of it share it.
        name: what is drawn, such as `crop`: each name has numbers of its own.
        sample_ids: [N], the samples of a batch in any order.
        count: numbers a sample.
    """
    key = derive_key(seed, "augment", step, "uniform", name, 0)
    blocks = np.arange(-(-count // WORDS))
    ids = np.asarray(sample_ids, dtype=np.uint64)
    words = philox_words(key, blocks[None, :], 0, ids[:, None])
    numbers = (words.reshape(len(ids), -1)[:, :count].astype(np.float64) + _CENTRE) / 2**32
    return numbers


def normal(seed: int, step: int, name: str, sample_id: int, count: int) -> NDArray[np.float32]:
    """Numbers of the standard normal distribution for one sample, [count] float32.

    Box & Muller, "A Note on the Generation of Random Normal Deviates", 1958. A clip takes many: the
    words are those of numpy's Philox4x64-10, in C and as stable, keyed by the sample too.
    """
    half = -(-count // 2)
    key = derive_key(seed, "augment", step, "normal", name, 0)
    raw = np.random.Philox(key=[key, sample_id % 2**64]).random_raw(half)
    words = raw.astype("<u8").view("<u4").astype(np.float32).reshape(half, 2)
    first, second = (words.T + np.float32(_CENTRE)) / np.float32(2**32)
    radius, angle = np.sqrt(-2 * np.log(first)), np.float32(2 * np.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
