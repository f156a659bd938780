"""Runs the same few steps as several layouts and compares each with a plain loop.

Masks, order and losses are compared in every layout, gradients before clipping where the engine
shows them: one process, DDP and FSDP2. DeepSpeed updates inside its own backward; under ZeRO the
weights after three steps are the proof.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from pipeline import parallel
from pipeline.config.load import dump_config
from pipeline.config.schema import RunConfig
from pipeline.records import RunFolder, read_jsonl, write_text
from pipeline.verify.compare import Outcome, Record, compare, draws_of
from pipeline.verify.layouts import GLOBAL_BATCH, NUM_STEPS, Layout, default_layouts
from pipeline.verify.probe import Digests

WORKER = "pipeline.verify.worker"
START_SECONDS = 240
"""Time that the processes of one start have."""
STOPPED = 75
Say = Callable[[str], None]

# AdamW turns the rounding of a gradient that is 0 in theory (the bias of attention's keys) into a
# whole step of the learning rate: with a larger epsilon, weights differ by masks and losses only.
EPSILON = 1e-4
# What belongs to a whole run, or is not the same sum twice: not part of three steps.
SHORT = {
    "global_batch_size": GLOBAL_BATCH,
    "per_device_eval_batch_size": 1,
    "max_steps": NUM_STEPS,
    "optim": "adamw_torch",
    "adam_epsilon": EPSILON,
    "bf16": False,
    "fp16": False,
    "logging_steps": 1,
    "eval_steps": None,
    "save_steps": None,
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
    "disable_tqdm": True,
}


class LayoutFailed(Exception):
    """A layout did not run to its end; the message holds what its processes said last."""


def verify_sync(config: RunConfig, layouts: list[Layout] | None, say: Say) -> list[Outcome]:
    """Compare layouts with the plain loop, and so with each other.

    Args:
        config: any run's configuration; three steps of eight samples are run with it, in float32.
        layouts: what to run; default: what this machine can.
        say: receives a line a layout.
    """
    num_devices = parallel.visible_devices(config.train.use_cpu)
    if layouts is None:
        layouts, notes = default_layouts(num_devices, config.dropout.learns())
        for note in notes:
            say(note)
    with tempfile.TemporaryDirectory(prefix="masklock-verify-") as scratch:
        folder = Path(scratch)
        started = time.perf_counter()
        expected = reference(config, folder)
        count, seconds = sum(1 for _ in draws_of(expected.masks)), _seconds(started)
        say(f"{'plain loop':<14} {'':<8} {count:>7,} masks {'':>41} {seconds:5.1f} s")
        outcomes = []
        for outcome in _outcomes(config, layouts, folder, expected, num_devices):
            outcomes.append(outcome)
            say(str(outcome))
    return outcomes


def _outcomes(
    config: RunConfig, layouts: list[Layout], folder: Path, expected: Record, num_devices: int
) -> Iterator[Outcome]:
    """In the order of the layouts; on a CPU those of one process share the cores."""
    cores = 1 if num_devices else os.cpu_count() or 1
    alone = [layout for layout in layouts if layout.is_alone]
    with ThreadPoolExecutor(max(1, min(cores, len(alone)))) as pool:
        ahead = {
            layout.name: pool.submit(_outcome, config, layout, folder, expected) for layout in alone
        }
        for layout in sorted(layouts, key=lambda layout: not layout.is_alone):
            is_ahead = layout.name in ahead
            yield (
                ahead[layout.name].result()
                if is_ahead
                else _outcome(config, layout, folder, expected)
            )


def reference(config: RunConfig, folder: Path) -> Record:
    """What the plain loop leaves, run in this process."""
    from pipeline.train import guarded_arguments, prepare
    from pipeline.verify.reference import run_by_hand

    small = short_run(config, Layout("single"), folder / "reference")
    run = RunFolder(Path(small.output_dir) / small.name)
    parts = prepare(small, run, guarded_arguments(small), lambda sentence: None)
    return run_by_hand(parts, NUM_STEPS)


def _outcome(config: RunConfig, layout: Layout, folder: Path, expected: Record) -> Outcome:
    started = time.perf_counter()
    try:
        found = run_layout(config, layout, folder / layout.name.replace(":", "-"))
    except LayoutFailed as failure:
        return Outcome.failed(layout.name, str(failure), _seconds(started))
    seconds, step_size = _seconds(started), config.train.learning_rate
    return compare(layout.name, found, expected, seconds, step_size=step_size)


def short_run(config: RunConfig, layout: Layout, folder: Path, start: int = 0) -> RunConfig:
    """A few steps of the run, as this layout runs them in one of its starts."""
    micro = GLOBAL_BATCH // (layout.num_processes[start] * layout.num_micro_batches)
    own = {
        "per_device_train_batch_size": micro,
        "gradient_checkpointing": layout.checkpointing,
    }
    return config.model_copy(
        update={
            "name": "run",
            "output_dir": str(folder),
            "train": config.train.model_copy(update=SHORT | own),
            "data": config.data.model_copy(update={"max_eval_samples": 1}),
            "wandb": config.wandb.model_copy(update={"mode": "disabled"}),
        }
    )


def run_layout(config: RunConfig, layout: Layout, folder: Path) -> Record:
    """Start the layout's processes, one start after another, and gather what they left."""
    folder.mkdir(parents=True)
    last = len(layout.num_processes) - 1
    for start in range(last + 1):
        file = folder / f"config-{start}.yaml"
        write_text(file, dump_config(short_run(config, layout, folder, start)))
        words = [str(file), str(folder), layout.name, str(start)]
        _start([sys.executable, "-m", WORKER, *words], 0 if start == last else STOPPED)
    return gather(folder)


def _start(command: list[str], expected_code: int) -> None:
    """Run a process with all that it starts; whatever is left of them after its time is ended."""
    with tempfile.TemporaryFile(mode="w+", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            code: int | None = process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_with_children(process)
        if code != expected_code:
            how = f"exit code {code}" if code is not None else f"no end within {START_SECONDS} s"
            log.seek(0)
            last = "\n      ".join(log.read().strip().splitlines()[-12:])
            raise LayoutFailed(f"{how}; its last lines:\n      {last}")


def end_with_children(process: subprocess.Popen[bytes], grace_seconds: float = 5.0) -> None:
    """End a process and whatever it started, first politely."""
    if process.poll() is not None:
        return
    alive = [psutil.Process(process.pid)]
    alive = [*alive[0].children(recursive=True), *alive]
    for act in ("terminate", "kill"):
        for one in alive:
            try:
                getattr(one, act)()
            except psutil.NoSuchProcess:
                pass
        _, alive = psutil.wait_procs(alive, grace_seconds)
    process.wait()


def gather(folder: Path) -> Record:
    """The record of all processes of a layout."""
    from safetensors.torch import load_file

    from pipeline.verify.reference import saved_weights

    masks: Digests = {}
    changed: list[str] = []
    gradients: dict = {}
    for file in sorted(folder.glob("*-*.json")):
        part = json.loads(file.read_text())
        changed += part["changed"]
        for step, sites in part["masks"].items():
            for site, samples in sites.items():
                masks.setdefault(step, {}).setdefault(site, {}).update(samples)
    for file in folder.glob("*-0.safetensors"):
        for place, gradient in load_file(file).items():
            step, _, name = place.partition("/")
            gradients.setdefault(step, {})[name] = gradient
    run = RunFolder(folder / "run")
    losses = {
        str(row["step"] - 1): row["train/loss"]
        for row in read_jsonl(run.metrics)
        if "train/loss" in row
    }
    return Record(masks, changed, losses, saved_weights(run.model), gradients)


def _seconds(started: float) -> float:
    return time.perf_counter() - started
