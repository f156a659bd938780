"""Layouts by name: how the same few steps are run (`ddp:2`, `accumulate:4`, `resume:1-2`, ...)."""

import importlib.util
import re
from dataclasses import dataclass

from pipeline.engines import INSTALL_DEEPSPEED
from pipeline.errors import ConfigError

NUM_STEPS = 3
GLOBAL_BATCH = 8
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

    def preset(self, start: int) -> str | None:
        """What launches a start; None: nothing, it is one plain process."""
        is_alone = self.engine is None and self.num_processes[start] == 1
        return None if is_alone else self.engine or "ddp"

    @property
    def is_alone(self) -> bool:
        """Whether no start of it has more than one process."""
        return all(self.preset(start) is None for start in range(len(self.num_processes)))


def default_layouts(num_devices: int, learns: bool = False) -> tuple[list[Layout], list[str]]:
    """What this machine can run of a configuration, and a sentence about what it cannot.

    Args:
        num_devices: accelerators that processes may take; 0: they run on the CPU.
        learns: whether rates are learned, which engines that cut up weights refuse.
    """
    n = 1 if num_devices == 1 else 2
    cutting, whole, notes = [f"fsdp2:{n}", f"zero3:{n}"], ["accumulate:8", f"zero1:{n}"], []
    if learns:
        notes.append(
            f"{' and '.join(cutting)} are left out: learned rates need each layer's whole weights, "
            f"which these engines cut up; {' and '.join(whole)} take their places"
        )
    sharded, last_zero = whole if learns else cutting
    zero = [f"zero2:{n}", last_zero]
    if importlib.util.find_spec("deepspeed") is None:
        notes.append(
            f"{' and '.join(zero)} are left out: the package deepspeed is not installed "
            f"({INSTALL_DEEPSPEED})"
        )
        zero = []
    if n == 1:
        notes.append(
            "several processes are left out: one device is visible (train.use_cpu=true runs them)"
        )
    names = ["single", "accumulate:4", "checkpointing", "padding", f"ddp:{n}", sharded, *zero]
    names += [f"resume:1-{n}", f"resume:{n}-1" if n > 1 else "accumulate:2"]
    return parse_layouts(",".join(names)), notes


def parse_layouts(text: str) -> list[Layout]:
    """Layouts from a comma-separated list, each once.

    Raises:
        ConfigError: every part that is no layout, and what layouts look like.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    layouts = [_parse(name) for name in names]
    wrong = [name for name, layout in zip(names, layouts, strict=True) if layout is None]
    if wrong or not names:
        asked = ", ".join(repr(name) for name in wrong) or "nothing"
        raise ConfigError([f"--layouts: {asked} is no layout; there are {_FORMS}"], "verify-sync")
    found = [layout for layout in layouts if layout is not None]
    if problems := [problem for layout in found for problem in _uneven(layout)]:
        raise ConfigError(problems, "verify-sync")
    return found


def _uneven(layout: Layout) -> list[str]:
    """Why the samples of a step cannot be shared out like this, if they cannot."""
    parts = [layout.num_micro_batches * count for count in layout.num_processes]
    return [
        f"--layouts: {layout.name} shares the {GLOBAL_BATCH} samples of a step among {part}; "
        f"choose a divisor of {GLOBAL_BATCH}"
        for part in parts
        if GLOBAL_BATCH % part
    ]


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
