"""Layouts by name: how the same few steps are run (`ddp:2`, `accumulate:4`, `resume:1-2`, ...)."""

import re
from dataclasses import dataclass

from pipeline.errors import ConfigError

DEFAULT = (
    "single,accumulate:4,checkpointing,padding,ddp:2,fsdp2:2,zero1:2,zero2:2,zero3:2,"
    "resume:1-2,resume:2-1"
)
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")
_FORMS = (
    "single, accumulate:N, checkpointing, padding, resume:N-M, or an engine with its number of "
    f"processes ({', '.join(f'{name}:N' for name in ENGINES)})"
)


@dataclass(frozen=True)
class Layout:
    """One way to run the same steps."""

    name: str
    num_processes: tuple[int, ...] = (1,)
    """Processes of each start; two starts are a run that is stopped and goes on."""
    engine: str | None = None
    """Preset of `configs/accelerate`; None: one plain process, or DDP on several."""
    num_micro_batches: int = 1
    """Micro-batches of one process in a step."""
    extra_padding: int = 0
    """Padding tokens added to every row of a batch."""
    checkpointing: bool = False


def parse_layouts(text: str) -> list[Layout]:
    """Layouts from a comma-separated list.

    Raises:
        ConfigError: every part that is no layout, and what layouts look like.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    layouts = [_parse(name) for name in names]
    wrong = [name for name, layout in zip(names, layouts, strict=True) if layout is None]
    if wrong or not names:
        asked = ", ".join(repr(name) for name in wrong) or "nothing"
        raise ConfigError([f"--layouts: {asked} is no layout; there are {_FORMS}"], "verify-sync")
    return [layout for layout in layouts if layout is not None]


def _parse(name: str) -> Layout | None:
    simple = {
        "single": Layout(name),
        "checkpointing": Layout(name, checkpointing=True),
        "padding": Layout(name, extra_padding=8),
    }
    if name in simple:
        return simple[name]
    kind, _, argument = name.partition(":")
    if kind == "accumulate" and re.fullmatch(r"[1-9]\d*", argument):
        return Layout(name, num_micro_batches=int(argument))
    if kind in ENGINES and re.fullmatch(r"[1-9]\d*", argument):
        return Layout(name, (int(argument),), engine=kind)
    if kind == "resume" and (found := re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", argument)):
        return Layout(name, (int(found[1]), int(found[2])))
    return None
