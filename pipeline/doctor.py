"""What this installation is made of, and what to do where it is not what the tests ran with."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
Level = Literal["ok", "note", "broken"]
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "evaluate", "pydantic")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, what to do."""

    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<6}  {self.subject:<12}  {self.text}"


def examine() -> list[Finding]:
    """Look at everything; a look that fails is itself a finding, never a traceback."""
    findings: list[Finding] = []
    for subject, look in _LOOKS.items():
        try:
            findings += [Finding(level, subject, text) for level, text in look()]
        except Exception as error:  # noqa: BLE001  whatever a broken installation throws is the answer
            findings.append(Finding("broken", subject, f"{type(error).__name__}: {_line(error)}"))
    return findings


def broken(findings: list[Finding]) -> bool:
    """Whether anything would stop a run."""
    return any(finding.level == "broken" for finding in findings)


Look = Callable[[], Iterator[tuple[Level, str]]]


def _python() -> Iterator[tuple[Level, str]]:
    yield "ok", f"{platform.python_version()} on {platform.platform(terse=True)}"


def _library(name: str) -> Look:
    def look() -> Iterator[tuple[Level, str]]:
        tested, wanted = tested_versions().get(name), required_ranges().get(name, "")
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield "broken", f"not installed; pip install '{name}{wanted}'"
            return
        yield judge_version(name, found, tested, wanted)

    return look


def judge_version(name: str, found: str, tested: str | None, wanted: str) -> tuple[Level, str]:
    """Compare an installed version with the tested one and with the supported range."""
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return "broken", f"{found}, but {wanted} is supported; pip install '{name}{wanted}'"
    if tested and found.partition("+")[0] != tested:
        return "note", f"{found} is supported ({wanted}); the tests ran with {tested}"
    return "ok", f"{found} (tested; {wanted} is supported)"


def tested_versions() -> dict[str, str]:
    """Versions in constraints.txt, which the tests ran with."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.lower(): version.strip() for name, version in pinned}


def required_ranges() -> dict[str, str]:
    """Supported ranges in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    matches = (re.match(r"([A-Za-z0-9_-]+)(.*)", line) for line in project["dependencies"])
    return {match[1].lower(): match[2] for match in matches if match}


def _kernel() -> Iterator[tuple[Level, str]]:
    from pipeline.dropout.kernels import active_kernel

    active = active_kernel()
    if not active.startswith("numpy"):
        yield "ok", f"{active}: checked against the known answers when it was loaded"
    elif os.environ.get("MASKLOCK_KERNEL") == "numpy":
        yield "note", "numpy, because MASKLOCK_KERNEL=numpy; unset it for the fast kernel"
    else:
        yield "note", "numpy (same masks, slower); with a C++ compiler: pip install -e . again"


def _threads() -> Iterator[tuple[Level, str]]:
    import torch

    cores, asked = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")
    text = f"{torch.get_num_threads()} of {cores} cores"
    yield "ok", f"{text} (OMP_NUM_THREADS={asked})" if asked else f"{text} (OMP_NUM_THREADS unset)"


def _devices() -> Iterator[tuple[Level, str]]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        text = f"torch is built for {built}, but no device answers; see its driver" if built else ""
        yield ("note", text) if built else ("ok", "CPU only")
        return
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield "ok", f"cuda:{index} {torch.cuda.get_device_name(index)}, {memory:.0f} GiB"


def _torchvision() -> Iterator[tuple[Level, str]]:
    """A torchvision built for another torch breaks transformers' image models when imported."""
    if importlib.util.find_spec("torchvision") is None:
        yield "ok", "not installed, and not needed"
        return
    try:
        import torchvision
    except Exception as error:  # noqa: BLE001  an operator that does not exist, a missing library, ...
        yield "broken", f"does not fit this torch ({_line(error)}); pip uninstall torchvision"
        return
    yield "ok", f"{torchvision.__version__} (not needed)"


def _wandb() -> Iterator[tuple[Level, str]]:
    try:
        found = importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        yield "note", "not installed: runs keep metrics.jsonl only; pip install wandb"
        return
    mode = os.environ.get("WANDB_MODE")
    said = f"WANDB_MODE={mode}" if mode else "offline unless `wandb.mode: online`"
    yield "ok", f"{found}, {said}"


def _runs() -> Iterator[tuple[Level, str]]:
    folder = Path("runs").absolute()
    place = folder if folder.exists() else folder.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        yield "broken", f"{place} cannot be written; go elsewhere, or set output_dir=/a/folder"
        return
    free = _free_gib(place)
    text = f"{folder} can be written, {free:.1f} GiB free"
    yield ("ok", text) if free >= 2 else ("note", f"{text}: little room for checkpoints")


def _free_gib(place: Path) -> float:

    return shutil.disk_usage(place).free / 2**30


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


_LOOKS: dict[str, Look] = {
    "python": _python,
    **{name: _library(name) for name in LIBRARIES},
    "kernel": _kernel,
    "threads": _threads,
    "devices": _devices,
    "torchvision": _torchvision,
    "wandb": _wandb,
    "./runs": _runs,
}
