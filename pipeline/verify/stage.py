"""Runs the same few steps as several layouts and compares each with a plain loop."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.config.load import dump_config
from pipeline.config.schema import RunConfig
from pipeline.records import RunFolder, read_jsonl, write_text
from pipeline.verify.compare import Outcome, Record, compare
from pipeline.verify.layouts import Layout
from pipeline.verify.probe import Digests
from pipeline.verify.reference import run_by_hand, saved_weights

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
NUM_STEPS = 3
GLOBAL_BATCH = 8
LAYOUT_SECONDS = 240
# AdamW turns the rounding of a gradient that is 0 in theory (the bias of attention's keys) into a
# whole step of the learning rate: with a larger epsilon, weights differ by masks and losses only.
EPSILON = 1e-4
Say = Callable[[str], None]


class LayoutFailed(Exception):
    """A layout did not run to its end; the message holds what its processes said last."""


def verify_sync(config: RunConfig, layouts: list[Layout], say: Say) -> list[Outcome]:
    """Compare layouts with the plain loop, and so with each other.

    Args:
        config: any run's configuration; three steps of eight samples are run with it.
        layouts: what to run.
        say: receives a line a layout.
    """
    with tempfile.TemporaryDirectory(prefix="masklock-verify-") as scratch:
        folder = Path(scratch)
        started = time.perf_counter()
        expected = _reference(config, folder)
        say(f"plain loop       {_count(expected.masks):>16,} masks   {_seconds(started):23.1f} s")
        outcomes = []
        for layout in layouts:
            outcomes.append(_outcome(config, layout, folder, expected))
            say(str(outcomes[-1]))
        return outcomes


def _reference(config: RunConfig, folder: Path) -> Record:
    from pipeline.train import guarded_arguments, prepare

    small = short_run(config, Layout("single"), folder / "reference")
    run = RunFolder(Path(small.output_dir) / small.name)
    parts = prepare(small, run, guarded_arguments(small), lambda sentence: None)
    return run_by_hand(parts, NUM_STEPS)


def _outcome(config: RunConfig, layout: Layout, folder: Path, expected: Record) -> Outcome:
    started = time.perf_counter()
    try:
        found = run_layout(config, layout, folder / layout.name.replace(":", "-"))
    except LayoutFailed as failure:
        return Outcome(layout.name, False, 0, None, (str(failure),), _seconds(started))
    return compare(layout.name, found, expected, _seconds(started))


def short_run(config: RunConfig, layout: Layout, folder: Path) -> RunConfig:
    """A few steps of the run, as this layout runs them."""
    per_process = GLOBAL_BATCH // (max(layout.num_processes) * layout.num_micro_batches)
    train = config.train.model_copy(
        update={
            "global_batch_size": GLOBAL_BATCH,
            "per_device_train_batch_size": max(1, per_process),
            "per_device_eval_batch_size": 1,
            "max_steps": NUM_STEPS,
            "adam_epsilon": EPSILON,
            "gradient_checkpointing": layout.checkpointing,
            "logging_steps": 1,
            "eval_steps": None,
            "save_steps": None,
            "load_best_model_at_end": False,
            "early_stopping_patience": None,
            "disable_tqdm": True,
        }
    )
    return config.model_copy(
        update={
            "name": "run",
            "output_dir": str(folder),
            "train": train,
            "data": config.data.model_copy(update={"max_eval_samples": 1}),
            "wandb": config.wandb.model_copy(update={"mode": "disabled"}),
        }
    )


def run_layout(config: RunConfig, layout: Layout, folder: Path) -> Record:
    """Start the layout's processes, one start after another, and gather what they left."""
    folder.mkdir(parents=True)
    starts = len(layout.num_processes)
    for place, num_processes in enumerate(layout.num_processes):
        once = replace(layout, num_processes=(num_processes,))
        file = folder / f"config-{place}.yaml"
        write_text(file, dump_config(short_run(config, once, folder)))
        is_last = place == starts - 1
        stop = [] if is_last else ["--stop-after", str(NUM_STEPS // 2)]
        _start(once, [str(file), str(folder), layout.name, *stop], 0 if is_last else 75)
    return gather(folder)


def _start(layout: Layout, arguments: list[str], expected_code: int) -> None:
    command = [*launcher(layout), "-m", "pipeline.verify.worker", *arguments]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LAYOUT_SECONDS,
            env=environment(),
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LayoutFailed(f"it did not end within {LAYOUT_SECONDS} s") from error
    # A launcher replaces the exit code of a stopped process by its own.
    if done.returncode != expected_code and not (expected_code and done.returncode):
        last = "\n      ".join(done.stdout.strip().splitlines()[-12:])
        raise LayoutFailed(f"it ended with exit code {done.returncode}:\n      {last}")


def gather(folder: Path) -> Record:
    """The record of all processes of a layout."""
    masks: Digests = {}
    changed: list[str] = []
    for file in sorted(folder.glob("*-*.json")):
        part = json.loads(file.read_text())
        changed += part["changed"]
        for step, sites in part["masks"].items():
            for site, samples in sites.items():
                masks.setdefault(step, {}).setdefault(site, {}).update(samples)
    run = RunFolder(folder / "run")
    losses = {
        str(row["step"]): row["train/loss"]
        for row in read_jsonl(run.metrics)
        if "train/loss" in row
    }
    return Record(masks, changed, losses, saved_weights(run.model))


def launcher(layout: Layout) -> list[str]:
    """What starts the processes of a layout."""
    (num_processes,) = layout.num_processes
    if layout.engine is None and num_processes == 1:
        return [sys.executable]
    preset = PRESETS / f"{layout.engine or 'ddp'}.yaml"
    options = ["--config_file", str(preset), "--num_processes", str(num_processes)]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options,
        "--main_process_port",
        str(free_port()),
    ]


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """This process's own, with threads shared out, and DeepSpeed on the CPU without a GPU."""
    import torch

    given = dict(os.environ)
    given.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        given.setdefault("DS_ACCELERATOR", "cpu")
    return given


def _count(masks: Digests) -> int:
    return sum(len(samples) for sites in masks.values() for samples in sites.values())


def _seconds(started: float) -> float:
    return time.perf_counter() - started
