"""What happens around the steps of a training: numbers to the tracker, a bar, a polite stop."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from pipeline import failure, parallel
from pipeline.dropout.concrete import learned_rates_of
from pipeline.tracking import Tracker

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Meter:
    """Samples, tokens and seconds of steps since the last log; evaluation and saving excluded."""

    num_samples: int = 0
    num_tokens: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    seconds: float = 0.0

    def count_tokens(self, inputs: dict[str, Any], sample_ids: torch.Tensor) -> None:
        """Add this process's tokens; stays on the device, so that nothing waits.

        Args:
            inputs: the model's.
            sample_ids: int64 `[B]`, or `[B, T]` of packed rows, below 0 on their padding.
        """
        mask = sample_ids >= 0 if sample_ids.dim() == 2 else inputs.get("attention_mask")
        if mask is not None:
            self.num_tokens = self.num_tokens.to(mask.device) + mask.sum()
        elif (ids := inputs.get("input_ids")) is not None:
            self.num_tokens = self.num_tokens + ids.numel()

    def read(self) -> dict[str, float]:
        """Rates over all processes, and a fresh start. Every process must call it."""
        tokens = parallel.sum_over_ranks(self.num_tokens).item()
        samples, seconds = self.num_samples, max(self.seconds, 1e-9)
        self.num_samples, self.seconds = 0, 0.0
        self.num_tokens = torch.zeros_like(self.num_tokens)
        return {
            "system/samples_per_second": samples / seconds,
            "system/tokens_per_second": tokens / seconds,
            "system/memory_mb": memory_mb(),
        }


def memory_mb() -> float:
    """Peak memory of the GPU in MB; without one, what this process holds now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    return psutil.Process().memory_info().rss / 1e6


class TrackMetrics(TrainerCallback):
    """Hands every logged number to the tracker, under its namespace.

    Args:
        steps_per_epoch: whole global batches in the training rows; the Trainer itself takes the
            whole stream for one epoch.
    """

    def __init__(
        self, tracker: Tracker, meter: Meter, global_batch_size: int, steps_per_epoch: int
    ):
        self.tracker, self.meter = tracker, meter
        self.global_batch_size, self.steps_per_epoch = global_batch_size, steps_per_epoch
        self._clock = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._clock = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.meter.seconds += now - self._clock
        self.meter.num_samples += self.global_batch_size
        self._clock = now

    def on_evaluate(self, args, state, control, **kwargs):
        self._clock = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self._clock = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        metrics = namespaced(logs or {})
        if "train/loss" in metrics:
            metrics["train/epoch"] = state.global_step / self.steps_per_epoch
            metrics["train/global_step"] = state.global_step
            metrics.update(self.meter.read())
            rates = learned_rates_of(kwargs["model"]) if "model" in kwargs else None
            named = rates.named_rates() if rates else {}
            metrics.update({f"dropout/{name}": rate for name, rate in named.items()})
        if metrics and parallel.is_main():
            self.tracker.log(metrics, state.global_step)


def namespaced(logs: dict[str, float]) -> dict[str, float]:
    """The Trainer's names as ours: `loss` is train/loss, `eval_ece` eval/ece; no summary."""
    train = {
        f"train/{name}": logs[name]
        for name in ("loss", "grad_norm", "learning_rate")
        if name in logs
    }
    evaluation = {
        f"eval/{name.removeprefix('eval_')}": value
        for name, value in logs.items()
        if name.startswith("eval_")
    }
    return train | evaluation


class ShowProgress(TrainerCallback):
    """A bar with loss and remaining time on a terminal, else a line a log; main process only."""

    def __init__(self, say: Callable[[str], None], disable_bar: bool) -> None:
        self.say = say
        self.draws = not disable_bar and sys.stderr.isatty()
        self.shown: dict[str, str] = {}
        self.bar: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.draws and parallel.is_main():
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="train",
                unit="step",
                dynamic_ncols=True,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = namespaced(logs or {})
        if not numbers or not parallel.is_main():
            return
        short = {
            name: f"{value:.4g}"
            for name, value in numbers.items()
            if "loss" in name or "eval/" in name
        }
        if self.bar is not None:
            self.shown.update(short)
            self.bar.set_postfix(dict(sorted(self.shown.items(), reverse=True)))
        else:
            listed = ", ".join(f"{name} {value}" for name, value in short.items())
            self.say(f"step {state.global_step}/{state.max_steps}: {listed}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class StopPolitely(TrainerCallback):
    """On the first Ctrl-C or SIGTERM: finish the step, save, stop. The second one stops at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.is_asked = False
        self.has_stopped = False
        # Ctrl-C reaches every process of a terminal, and the launcher then passes it on to its own.
        self.echo_seconds = 2.0 if parallel.world_size() > 1 else 0.0
        self._asked_at = 0.0
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over while the block runs (only the main thread of a program may)."""
        try:
            before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        if parallel.agree_any(self.is_asked, args.device) and state.global_step < args.max_steps:
            control.should_save = True
            control.should_training_stop = True
            self.has_stopped = True

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a worker that loads data: its parent decides
        if failure.is_ending():
            return  # the launcher ends this process because another one failed
        if self.is_asked:
            if time.monotonic() - self._asked_at > self.echo_seconds:
                raise KeyboardInterrupt
            return
        self.is_asked, self._asked_at = True, time.monotonic()
        if parallel.is_main():
            name = signal.Signals(number).name
            self.say(
                f"{name}: finishing this step, then saving. A second one stops at once, unsaved."
            )
