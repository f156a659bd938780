"""Engines by name: presets, how to launch them, and what in them contradicts the run.

Nothing here trains; the layout that really runs is checked by pipeline/parallel.py.
"""

import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import LayoutError
from pipeline.failure import EXIT_CODE_FILE

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "configs" / "accelerate"
DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
INSTALL_DEEPSPEED = "pip install -e '.[deepspeed]'"


# -- presets and launching -------------------------------------------------------------------------


def find_preset(name: str) -> Path:
    """The accelerate configuration of this name (`zero2`) or path."""
    if (path := Path(name)).is_file():
        return path
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if name in known:
        return PRESETS / f"{name}.yaml"
    raise LayoutError(
        f"--accelerate-config {name} is neither a file nor a preset. Presets: {', '.join(known)}."
    )


def read_preset(path: Path) -> dict[str, Any]:
    """The content of an accelerate configuration."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LayoutError(f"{path} is no accelerate configuration: {error}") from error
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise LayoutError(
            f"{path} is no accelerate configuration: it does not say `distributed_type`."
        )
    return content


def launch(
    preset: str, num_processes: int | None, words: Sequence[str], module: str = "pipeline"
) -> int:
    """Run `accelerate launch` with a preset; the exit code of the process that failed first.

    Args:
        preset: name or path.
        num_processes: processes on this machine; default: the preset's own number.
        words: what each process runs, from `train` on.
        module: whose command line reads them.
    """
    path = find_preset(preset)
    content = read_preset(path)
    require_engine(str(content["distributed_type"]))
    count = num_processes or int(content.get("num_processes") or 1)
    if content.get("use_cpu"):
        words = [*words, "train.use_cpu=true"]
    os.environ.update(launch_environment(count, os.environ))
    options = ["--config_file", str(path), "--num_processes", str(count), "--num_machines", "1"]
    options += ["--main_process_port", "0", "--dynamo_backend", "no", "--module", module]
    return _run_launcher([*options, *words])


def launch_environment(num_processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What the processes need to know beside accelerate's own: threads, and no search for a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (cores or 1) // num_processes)
    found = {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(threads))}
    if "DS_ACCELERATOR" not in environment and not _has_accelerator():
        found["DS_ACCELERATOR"] = "cpu"
    return found


def _run_launcher(words: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The processes say what failed; the launcher would say again that they did.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    told = tempfile.NamedTemporaryFile(prefix="masklock-")
    os.environ[EXIT_CODE_FILE] = told.name
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode) if failure.exitcode > 0 else 1
    except SignalException as error:
        return int(told.read() or 128 + int(error.sigval))
    finally:
        told.close()
    return 0


def require_engine(distributed_type: str) -> None:
    """Refuse an engine whose package is not here."""
    if distributed_type == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise LayoutError(
            "The launch configuration asks for DeepSpeed, but the package deepspeed is not "
            f"installed. Install it with `{INSTALL_DEEPSPEED}`, or choose another preset: cpu, "
            "ddp, fsdp2."
        )


# -- what a process was launched with --------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the launch configuration says about things that the run says too; "auto" follows."""

    mixed_precision: str = "no"
    gradient_accumulation_steps: str = "auto"
    gradient_clipping: str = "auto"
    fsdp_version: str = "2"
    fsdp_activation_checkpointing: str = "false"
    deepspeed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Settings":
        """As `accelerate launch` handed it to this process."""
        uses_fsdp = environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        uses_deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        return cls(
            environment.get("ACCELERATE_MIXED_PRECISION", "no"),
            environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
            environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto"),
            environment.get("FSDP_VERSION", "1") if uses_fsdp else "2",
            environment.get("FSDP_ACTIVATION_CHECKPOINTING", "false"),
            _read_json(environment.get(DEEPSPEED_FILE, "")) if uses_deepspeed else {},
        )


def settle_environment(environment: MutableMapping[str, str]) -> None:
    """Before an engine reads it: the DeepSpeed file, and no search for a GPU without one."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return
    require_engine("DEEPSPEED")
    name = environment.get(DEEPSPEED_FILE, "")
    if name and not Path(name).is_file():
        if not (ROOT / name).is_file():
            raise LayoutError(
                f"The launch configuration names the DeepSpeed file {name}, but it is neither in "
                f"{Path.cwd()} nor in {ROOT}. Correct deepspeed_config_file."
            )
        environment[DEEPSPEED_FILE] = str(ROOT / name)
    if not _has_accelerator():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        _without_helper_build()


def contradictions(settings: Settings, expected: Mapping[str, Any]) -> list[str]:
    """Where launch configuration and run say different things, one sentence each.

    Args:
        settings: of the launch configuration.
        expected: what follows from the run, by DeepSpeed's dotted names, and `mixed_precision`.
    """
    precision = expected["mixed_precision"]
    problems = []
    if settings.mixed_precision not in ("no", precision):
        problems.append(_differs("mixed_precision", settings.mixed_precision, precision))
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        value = getattr(settings, name)
        if value != "auto" and float(value) != float(expected[name]):
            problems.append(_differs(name, value, expected[name]))
    if settings.fsdp_version != "2":
        problems.append("fsdp_version: 1 is not supported, set fsdp_version: 2")
    if settings.fsdp_activation_checkpointing.lower() == "true":
        problems.append(
            "fsdp_activation_checkpointing: its recompute would draw other masks, set "
            "train.gradient_checkpointing instead"
        )
    return problems + _deepspeed_contradictions(settings.deepspeed, expected)


def _deepspeed_contradictions(file: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    found = _flat(file)
    problems = [
        _differs(f"DeepSpeed file, {name}", found[name], value)
        for name, value in expected.items()
        if found.get(name, "auto") != "auto" and found[name] != value
    ]
    problems += [
        f"DeepSpeed file, {name}: Masklock makes it from the train section, leave it out"
        for name in ("optimizer", "scheduler")
        if name in file
    ]
    gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if found.get("zero_optimization.stage") == 3 and found.get(gather) is not True:
        problems.append(f"DeepSpeed file, {gather}: set it to true, or no model can be saved")
    return problems


def _differs(name: str, there: Any, here: Any) -> str:
    return f'{name} is {there} there, but {here} follows from the run; set it to "auto" or leave it'


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_json(name: str) -> Mapping[str, Any]:
    if not name:
        return {}
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LayoutError(f"The DeepSpeed file {name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise LayoutError(f"The DeepSpeed file {name} must hold one JSON object.")
    return content


# -- engines below their surface -------------------------------------------------------------------


@contextmanager
def built_whole(unless: bool = False) -> Iterator[None]:
    """Build models unsharded inside: transformers would shard every one under ZeRO-3, plans too.

    Args:
        unless: let it (zero3_init_flag: true), for models too large for one process.
    """
    from transformers.integrations import deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    if not unless:
        integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before


@contextmanager
def unsharded() -> Iterator[None]:
    """Each process holds whole models inside, whichever engine the launcher asked for."""
    name = "ACCELERATE_USE_FSDP"  # transformers would load the weights on the main process alone
    before = os.environ.pop(name, None)
    try:
        with built_whole():
            yield
    finally:
        if before is not None:
            os.environ[name] = before


def _without_helper_build() -> None:
    """DeepSpeed would compile a helper of some minutes at its first start on a CPU.

    A start killed meanwhile leaves a lock on which all later ones hang; gloo does the same work.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
