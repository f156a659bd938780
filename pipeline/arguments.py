"""The Trainer's arguments of a run: pure arithmetic on configuration, world size and rows."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler

from pipeline.config.installed import installed_problems
from pipeline.config.schema import RunConfig
from pipeline.config.training import TrainConfig
from pipeline.dropout.noise import NEFTUNE
from pipeline.dropout.plan import DropoutPlan
from pipeline.engines import Settings, contradictions
from pipeline.errors import ConfigError, DropoutError, LayoutError
from pipeline.parallel import default_use_cpu

# Of the Trainer's own defaults, those that cost something in every step.
DEFAULTS = {"ddp_find_unused_parameters": False}

NO_FP16 = (
    "train.fp16: mixed precision in float16 was asked for, but this run is on the CPU, where its "
    "small gradients are lost; set train.bf16 instead, or neither, or run it on a GPU"
)

PROBES = ("?", "true", "7")
"""Values of which every argument that is read takes one for something else than its default."""

# Names that mean the same here and there.
SAME_NAMES = (
    "per_device_eval_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "dataloader_num_workers",
    "logging_steps",
    "metric_for_best_model",
)


def training_arguments(config: RunConfig, output_dir: str, world_size: int) -> TrainingArguments:
    """Everything that does not depend on the data; `set_horizon` adds the steps."""
    if problems := installed_problems(config):
        raise ConfigError(problems)
    micro, accumulation = batch_split(config.train, world_size)
    use_cpu = default_use_cpu() if config.train.use_cpu is None else config.train.use_cpu
    if config.train.fp16 and use_cpu:
        raise ConfigError([NO_FP16])
    given = {name: getattr(config.train, name) for name in SAME_NAMES}
    values = {
        **given,
        "output_dir": output_dir,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "seed": config.seed % 2**32,
        "use_cpu": use_cpu,
        "greater_is_better": greater_is_better(config.train),
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,  # our own progress bar knows whether it may draw
        "report_to": "none",
        "save_strategy": "steps",
        "eval_strategy": "no",
        "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting
        **_recompute(config.train),
    }
    try:
        extra = {name: value for name, value in config.train.extra.items() if name != NEFTUNE}
        return TrainingArguments(**(DEFAULTS | extra | values))
    except (ValueError, TypeError) as error:
        raise ConfigError([f"train: {error}"]) from error


def set_horizon(
    args: TrainingArguments, train: TrainConfig, num_rows: int, has_validation: bool
) -> int:
    """Set how long to train and when to evaluate and save; return the number of steps."""
    steps = num_steps(train, num_rows)
    args.max_steps = steps
    args.save_steps = min(train.save_steps or steps, steps)
    if has_validation:
        args.eval_strategy = type(args.eval_strategy)("steps")
        args.eval_steps = min(train.eval_steps or steps, steps)
    return steps


def num_steps(train: TrainConfig, num_rows: int) -> int:
    """Optimizer steps: `max_steps`, or whole global batches of so many epochs."""
    if train.max_steps is not None:
        return train.max_steps
    return max(1, math.ceil(train.num_train_epochs * (num_rows // train.global_batch_size)))


def batch_split(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """Micro-batch of one process and accumulation steps that make up the global batch."""
    total = train.global_batch_size
    if total % world_size:
        raise ConfigError([_no_split(total, world_size)])
    micro = train.per_device_train_batch_size or total // world_size
    if total % (micro * world_size):
        fitting = [size for size in range(1, total + 1) if (total // world_size) % size == 0]
        near = sorted(sorted(fitting, key=lambda size: abs(size - micro))[:3])
        raise ConfigError(
            [
                f"train.per_device_train_batch_size: {micro} on {world_size} processes does not "
                f"divide train.global_batch_size {total}; use one of {_listed(near)}"
            ]
        )
    return micro, total // (micro * world_size)


def greater_is_better(train: TrainConfig) -> bool:
    """Accuracy and F1 are better when greater; losses, errors and perplexity when smaller."""
    if train.greater_is_better is not None:
        return train.greater_is_better
    return train.metric_for_best_model.removeprefix("eval_") in {"accuracy", "f1"}


def check_launch(config: RunConfig, settings: Settings, world_size: int) -> None:
    """What the launch configuration says must be what the run says, or nothing.

    Raises:
        LayoutError: every contradiction, with what to do.
    """
    train = config.train
    micro, accumulation = batch_split(train, world_size)
    expected = {
        "mixed_precision": "bf16" if train.bf16 else "fp16" if train.fp16 else "no",
        "bf16.enabled": train.bf16,
        "fp16.enabled": train.fp16,
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.max_grad_norm,
    }
    if problems := contradictions(settings, expected):
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise LayoutError(f"The launch configuration contradicts the run:\n{listed}")


def check_learned(plan: DropoutPlan, engine: str, zero_stage: int) -> None:
    """Learned rates see each layer's whole weights, which FSDP and ZeRO-3 cut up.

    Raises:
        DropoutError: such an engine was asked for.
    """
    if engine != "FSDP" and zero_stage < 3:
        return
    if learned := [site for site in plan.in_force() if site.learned]:
        roles = ", ".join(dict.fromkeys(f"dropout.{site.role}" for site in learned))
        raise DropoutError(
            f"{roles}: learned rates were asked for on {'FSDP2' if engine == 'FSDP' else 'ZeRO-3'},"
            " but their regulariser needs each layer's whole weights, which this engine cuts up. "
            "Nothing was written. Launch with --accelerate-config ddp, zero1 or zero2, or give a "
            "rate without learned."
        )


def check_metric(train: TrainConfig, metric_names: tuple[str, ...]) -> None:
    """The metric that chooses the best model must be one that evaluation computes."""
    name = train.metric_for_best_model.removeprefix("eval_")
    if name not in metric_names:
        raise ConfigError(
            [f"train.metric_for_best_model: {name!r} is not one of {_listed(metric_names)}"]
        )


def check_optimizer(args: TrainingArguments) -> None:
    """Optimizer and schedule can be made here: their package is there, their arguments fit.

    Raises:
        ConfigError: what the Trainer would otherwise say after the first files are written.
    """
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=args.learning_rate)
    schedule = SchedulerType(args.lr_scheduler_type).value
    given: Any = args.lr_scheduler_kwargs
    problems: list[str] = []
    try:
        problems += _optim_args_problems(args)
    except ImportError as error:
        problems.append(f"train.optim: {error}")
    try:
        get_scheduler(schedule, optimizer, 0, 2, scheduler_specific_kwargs=given)
    except (TypeError, ValueError) as error:
        problems.append(f"train.lr_scheduler_kwargs: {schedule} refuses {given or 'none'}: {error}")
    if problems:
        raise ConfigError(problems)


def _optim_args_problems(args: TrainingArguments) -> Iterator[str]:
    """What in `optim_args` cannot be read, or changes nothing whatever its value."""
    given = [entry.partition("=") for entry in (args.optim_args or "").split(",") if entry.strip()]
    place, optimizer = "train.extra.optim_args", str(getattr(args.optim, "value", args.optim))
    if wrong := ["".join(entry) for entry in given if not entry[1]]:
        yield f"{place}: {_listed(wrong)} is no NAME=VALUE; separate several by commas"
        return
    try:
        without = _optimizer(args, "")
    except ValueError:  # it needs the model itself: the Trainer's to judge
        return
    for name in (entry[0].strip() for entry in given):
        if all(_optimizer_or_error(args, f"{name}={value}") == without for value in PROBES):
            yield f"{place}: {optimizer} has no {name!r}, it would be ignored; leave it out"
    if isinstance(error := _optimizer_or_error(args, args.optim_args or ""), str):
        yield f"{place}: {optimizer} refuses {args.optim_args}: {error}"


def _optimizer(args: TrainingArguments, optim_args: str) -> Any:
    """Class and arguments of the optimizer with other `optim_args`."""
    changed = copy.copy(args)
    changed.optim_args = optim_args
    return Trainer.get_optimizer_cls_and_kwargs(changed)


def _optimizer_or_error(args: TrainingArguments, optim_args: str) -> Any:
    try:
        return _optimizer(args, optim_args)
    except (ValueError, AttributeError, TypeError) as error:
        return str(error)


def _recompute(train: TrainConfig) -> dict[str, Any]:
    """Checkpointing without reentrance, which also works when the embeddings are frozen."""
    if not train.gradient_checkpointing:
        return {}
    return {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    }


def _no_split(total: int, world_size: int) -> str:
    smaller = max(total - total % world_size, world_size)
    larger = smaller if smaller > total else smaller + world_size
    return (
        f"train.global_batch_size: {total} cannot be divided among {world_size} processes; "
        f"use {_listed(sorted({smaller, larger}))}, or another number of processes"
    )


def _listed(items: Any) -> str:
    *head, last = [str(item) for item in items]
    return f"{', '.join(head)} or {last}" if head else last
