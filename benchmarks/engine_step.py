"""A training step on two processes: our trainer with keyed masks against the stock Trainer.

    python benchmarks/engine_step.py [--engine cpu zero2] [--pairs 40]

Both sides train for real, each as two processes of the same engine, on the same rows, model and
rates (0.1 everywhere); stock with its default attention (SDPA) and without DDP's search for unused
parameters, which ours leaves out too. All four processes are alive at once, and one side at a time
is given leave for one whole step: data, forward, backward, exchange of gradients, clipping, update.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

SIDES, PROCESSES, WARM_UP = ("ours", "stock"), 2, 4
BATCH, LENGTH, CLASSES = 16, 64, 8  # rows of one process; tokens; labels
MODEL = {
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "max_position_embeddings": LENGTH,
}
LONG = 100_000  # steps: the benchmark ends the training
START_SECONDS = 120


# -- the side that measures ------------------------------------------------------------------------


def main() -> None:
    given = options()
    if given.side:
        worker(given.side, given.address, Path(given.folder))
        return
    print(f"{PROCESSES} processes, {BATCH} x {LENGTH} tokens each, {given.pairs} pairs of steps")
    print("| engine | our step, CPU s | CPU, ours / stock | our step, wall s | wall |")
    print("|---|---|---|---|---|")
    for engine in given.engine:
        with tempfile.TemporaryDirectory() as folder, both_sides(engine, Path(folder)) as sides:
            print(f"| {engine} | {table_row(sides, given.pairs)} |", flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", nargs="+", default=["cpu", "zero2"], help="presets")
    parser.add_argument("--pairs", type=int, default=40)
    for name in ("--side", "--address", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_known_args()[0]  # deepspeed adds a rank


@contextlib.contextmanager
def both_sides(engine: str, folder: Path) -> Iterator[dict[str, list[Connection]]]:
    """Start two trainings of two processes; each waits for leave to make a step."""
    from pipeline.engines import find_preset, launch_environment

    write_rows(folder)
    with Listener(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(find_preset(engine)), "--num_processes", str(PROCESSES)]
        command += ["--main_process_port", "0", __file__, "--folder", str(folder)]
        command += ["--address", f"127.0.0.1:{listener.address[1]}", "--side"]
        environment = os.environ | launch_environment(PROCESSES, os.environ)
        environment["WANDB_MODE"] = "disabled"
        with (folder / "log").open("w") as log:
            started = [
                subprocess.Popen([*command, side], env=environment, stdout=log, stderr=log)
                for side in SIDES
            ]
        try:
            yield accept_all(listener, started, folder / "log")
        except (EOFError, ConnectionError) as error:
            said = (folder / "log").read_text()[-2000:]
            raise SystemExit(f"a side ended in the middle:\n{said}") from error
        finally:
            for process in started:
                process.terminate()
                process.wait()


def accept_all(listener: Listener, started: list[Any], log: Path) -> dict[str, list[Connection]]:
    sides: dict[str, list[Connection]] = {side: [] for side in SIDES}
    listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]
    end = time.monotonic() + START_SECONDS
    while sum(map(len, sides.values())) < PROCESSES * len(SIDES):
        if time.monotonic() > end or any(process.poll() is not None for process in started):
            raise SystemExit(f"a side did not start:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(TimeoutError):
            connection = listener.accept()
            sides[connection.recv_bytes().decode()].append(connection)
    return sides


def table_row(sides: dict[str, list[Connection]], num_pairs: int) -> str:
    """Medians of our step, and of the ratios of neighbouring steps."""
    measured: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for pair in range(num_pairs + WARM_UP):
        for side in SIDES if pair % 2 else reversed(SIDES):
            measured[side].append(one_step(sides[side]))
    ours, stock = (measured[side][WARM_UP:] for side in SIDES)
    cells = []
    for quantity in range(2):
        mine, theirs = ([step[quantity] for step in side] for side in (ours, stock))
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        cells += [f"{statistics.median(mine):.3f}", f"{statistics.median(ratios):.2f}"]
    return " | ".join(cells)


def one_step(connections: list[Connection]) -> tuple[float, float]:
    """CPU seconds of both processes together, and seconds by the clock on the wall."""
    started = time.perf_counter()
    for connection in connections:
        connection.send_bytes(b"go")
    seconds = sum(float(connection.recv_bytes()) for connection in connections)
    return seconds, time.perf_counter() - started


def write_rows(folder: Path) -> None:
    for split, count in (("train", 512), ("validation", 8), ("test", 8)):
        rows = (
            {"text": " ".join(f"word{k * j % 97}" for j in range(LENGTH)), "label": k % CLASSES}
            for k in range(count)
        )
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


# -- a process that trains -------------------------------------------------------------------------


def worker(side: str, address: str, folder: Path) -> None:
    from transformers import TrainerCallback

    class OneStepAtATime(TrainerCallback):
        """Reports what a step took and waits for leave to make the next."""

        def __init__(self) -> None:
            host, _, port = address.partition(":")
            self.parent = Client((host, int(port)))
            self.parent.send_bytes(side.encode())
            self.started: float | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.started is not None:
                self.parent.send_bytes(str(time.process_time() - self.started).encode())
            try:
                self.parent.recv_bytes()
            except EOFError:
                os._exit(0)  # all is measured: nothing to save
            self.started = time.process_time()

    from pipeline.train import train

    config = run_config(side, folder)
    if side == "ours":
        train(config, instrument=lambda trainer: trainer.add_callback(OneStepAtATime()))
    else:
        train_stock(config, folder, OneStepAtATime())


def run_config(side: str, folder: Path) -> Any:
    from pipeline.config.schema import RunConfig

    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return RunConfig.model_validate(
        {
            "name": side,
            "output_dir": str(folder),
            "model": {
                "task": "text-classification",
                "model_type": "bert",
                "config_overrides": MODEL,
            },
            "data": {"path": "json", "data_files": files, "max_length": LENGTH},
            "train": {
                "global_batch_size": BATCH * PROCESSES,
                "max_steps": LONG,
                "save_steps": LONG,
                "use_cpu": True,
                "disable_tqdm": True,
            },
            "wandb": {"mode": "disabled"},
        }
    )


def train_stock(config: Any, folder: Path, callback: Any) -> None:
    """The same model and rows as a user of the stock Trainer would train them."""
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from pipeline.engines import settle_environment
    from pipeline.records import RunFolder
    from pipeline.train import guarded_arguments, prepare

    settle_environment(os.environ)
    run = RunFolder(folder / config.name)
    parts = prepare(config, run, guarded_arguments(config), lambda sentence: None)
    bert = type(parts.model.config)(
        **MODEL, num_labels=CLASSES, vocab_size=len(parts.processor), pad_token_id=0
    )
    arguments = TrainingArguments(
        str(folder / "stock"),
        per_device_train_batch_size=BATCH,
        max_steps=LONG,
        logging_steps=config.train.logging_steps,
        optim=config.train.optim,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        ddp_find_unused_parameters=False,
    )
    rows = parts.data.train.remove_columns(["text", "sample_id"])
    Trainer(
        AutoModelForSequenceClassification.from_config(bert, attn_implementation="sdpa"),
        arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(parts.processor, pad_to_multiple_of=8),
        callbacks=[callback],
    ).train()


if __name__ == "__main__":
    main()
