"""Names into numbers: the 64-bit key of a site call, the canonical name of a site, the id of a row.

The bits are fixed (MaskSpec v1): a change here changes every mask of every saved run.
"""

import re
from collections.abc import Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING

from pipeline.errors import DropoutError

if TYPE_CHECKING:
    from torch import Tensor

SPEC = "masklock-v1"
STEP_ROW_ID = 2**64 - 1
"""Row id of decisions made once for a whole step."""
_NUM_VIEWS = 255
_VIEW_SHIFT = 56

# Every wrapper that puts itself between the bare model and one of its modules.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))"
    r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\.)+"
    r"|\.(?:base_layer|modules_to_save\.[^.]+)(?=\.|$)"
)


def derive_key(seed: int, purpose: str, index: int, variant: str, site: str, call: int) -> int:
    """Key of one site call: blake2b over the six coordinates, as an integer below 2**64."""
    text = f"{SPEC}\0{seed}\0{purpose}\0{index}\0{variant}\0{site}\0{call}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def derive_keys(
    seed: int, purpose: str, index: int, sites: Iterable[tuple[str, str, int]]
) -> list[int]:
    """Keys of many (variant, site, call) of one step; equal to `derive_key` one by one."""
    prefix = f"{SPEC}\0{seed}\0{purpose}\0{index}\0"
    texts = (f"{prefix}{variant}\0{site}\0{call}".encode() for variant, site, call in sites)
    return [int.from_bytes(blake2b(text, digest_size=8).digest(), "little") for text in texts]


def canonical_site(name: str) -> str:
    """Qualified name of a module in the bare model, whatever wraps it (DDP, FSDP, PEFT, ...)."""
    return _WRAPPERS.sub("", name)


def row_id(sample_id: int, view: int = 0) -> int:
    """Id of one row of a batch: its sample, and which view of that sample it is."""
    if not 0 <= sample_id < 2**_VIEW_SHIFT:
        raise DropoutError(
            f"Sample ids lie between 0 and 2**{_VIEW_SHIFT} - 1, but this one is {sample_id}. "
            "Number the rows of the prepared data set from 0."
        )
    if not 0 <= view < _NUM_VIEWS:
        raise DropoutError(
            f"Views lie between 0 and {_NUM_VIEWS - 1}, but this one is {view}. "
            "Use at most 255 views of one sample in a batch."
        )
    return sample_id + (view << _VIEW_SHIFT)


def view_of(sample_ids: "Tensor", view: int) -> "Tensor":
    """Row ids of one view of samples whose ids were checked when they were made."""
    return sample_ids + (view << _VIEW_SHIFT)


def signed(value: int) -> int:
    """The same 64 bits as an int64, the form in which keys and row ids travel in tensors."""
    return value - 2**64 if value >= 2**63 else value
