"""Which rows run together. The last bits of a row depend on it, so scored rows remember it."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from pipeline.errors import DataError

Batches = list[list[int]]
_BITS = 53  # survives a column that was turned into float64 on its way


def by_length(lengths: Sequence[int], batch_size: int) -> Batches:
    """Places of rows of like length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_keys(sample_ids: Sequence[int], batches: Batches) -> list[int]:
    """A number for each row that names its batch: a hash of the batch's sample ids, in order."""
    keys = [0] * len(sample_ids)
    for batch in batches:
        key = _key([sample_ids[place] for place in batch])
        for place in batch:
            keys[place] = key
    return keys


def batches_again(
    sample_ids: Sequence[int], lengths: Sequence[int], keys: Sequence[int], places: Sequence[int]
) -> Batches:
    """The whole batches in which the rows at these places ran, from the keys that they remember.

    Raises:
        DataError: rows that ran together with them are not there.
    """
    members: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        members.setdefault(key, []).append(place)
    wanted = dict.fromkeys(keys[place] for place in places)
    batches = [sorted(members[key], key=lambda place: -lengths[place]) for key in wanted]
    for key, batch in zip(wanted, batches, strict=True):
        if _key([sample_ids[place] for place in batch]) != key:
            raise DataError(
                f"Sample {sample_ids[batch[0]]} was scored together with rows that are missing "
                "here, or are in another order: its numbers cannot be computed again to the last "
                "bit. Give all rows of the scored file, in their order."
            )
    return batches


def _key(sample_ids: Sequence[int]) -> int:
    data = np.asarray(sample_ids, dtype="<i8").tobytes()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> (64 - _BITS)
