"""What a dropout site drops, and how that becomes kernel arguments. A new variant is one entry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import DropoutError

SHARED_POSITION = 0xFFFFFFFF
"""Position of masks that all positions of a row share."""


@dataclass(frozen=True)
class Variant:
    """How one variant draws.

    Args:
        name: its name in the key and in configurations.
        kernel: `rows` and `attention` mask tensors, `scalar` makes one decision by `uniform`,
            `choice` one for all channels of a sample,
            `spans` chooses spans of an axis, `noise` adds and drops nothing.
        group: number of neighbouring features under one decision, from (features, block size).
        needs_block_size: the group is a choice.
        shared_position: one mask for all positions of a row.
        whole_step: one decision for all samples of a step.
    """

    name: str
    kernel: Literal["rows", "attention", "scalar", "choice", "spans", "noise"] = "rows"
    group: Callable[[int, int], int] = lambda features, block_size: 1
    needs_block_size: bool = False
    shared_position: bool = False
    whole_step: bool = False

    def position(self, position: int) -> int:
        """The position that goes into the counter."""
        return SHARED_POSITION if self.shared_position else position


VARIANTS: dict[str, Variant] = {}


def register(variant: Variant) -> None:
    """Add a variant; a name is given once."""
    if variant.name in VARIANTS:
        raise ValueError(f"The variant {variant.name!r} exists already: choose another name.")
    VARIANTS[variant.name] = variant


def find_variant(name: str) -> Variant:
    """The variant of this name."""
    if name not in VARIANTS:
        known = ", ".join(sorted(VARIANTS))
        raise DropoutError(f"There is no dropout variant {name!r}. Choose one of: {known}.")
    return VARIANTS[name]


for _variant in (
    Variant("element"),
    Variant("channel", shared_position=True),
    Variant("token", group=lambda features, block_size: max(features, 1)),
    Variant("block", group=lambda features, block_size: block_size, needs_block_size=True),
    Variant("attention", kernel="attention"),
    Variant("path", kernel="scalar"),
    Variant("layer", kernel="scalar", whole_step=True),
    Variant("modality", kernel="choice"),
    Variant("spectrogram", kernel="spans"),
    Variant("noise", kernel="noise"),
    Variant("jitter", kernel="noise"),
):
    register(_variant)
