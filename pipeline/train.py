"""The training stage: from a configuration to a run folder with a trained model."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments

from pipeline import agreement, checkpoint, engines, parallel, quantization, zero
from pipeline.arguments import (
    check_launch,
    check_learned,
    check_metric,
    check_optimizer,
    set_horizon,
    training_arguments,
)
from pipeline.callbacks import Meter, ShowProgress, StopPolitely, TrackMetrics
from pipeline.config.load import config_diff, config_hash, dump_config, load_config
from pipeline.config.schema import RunConfig
from pipeline.data import PreparedData, load_raw, prepare_data, require_enough, training_stream
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import RunFolderError
from pipeline.library_output import without_old_collectives
from pipeline.modality.bundle import modality_of
from pipeline.model import build_model, plan_for
from pipeline.packing import packed, require_isolation
from pipeline.records import RunFolder, write_json, write_jsonl, write_text
from pipeline.sharding import running_layout, use_one_device
from pipeline.tracking import Tracker, open_tracker
from pipeline.trainer import LockedTrainer

STOPPED = 75
logger = logging.getLogger(__name__)
Say = Callable[[str], None]
Instrument = Callable[[LockedTrainer], None]
"""Looks into, or changes, a trainer that is ready to start; for measuring and proving."""

# A run may go on with other values of these: they change neither masks nor order nor the objective.
FREE_SECTIONS = ("output_dir", "wandb", "evaluation", "monitoring")
FREE_TRAIN_FIELDS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_checkpointing",
    "use_cpu",
    "dataloader_num_workers",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "disable_tqdm",
)


ALLOW_BATCH_CHANGE = (
    " Another global batch means other rows in each of the steps to come: if that is meant, give "
    "--allow-batch-change."
)


@dataclass(frozen=True)
class Parts:
    """Everything a training is made of, checked, before anything is written."""

    config: RunConfig
    run: RunFolder
    args: TrainingArguments
    data: PreparedData
    processor: Any
    plan: DropoutPlan
    model: Any
    found: Path | None
    say: Say

    @property
    def facts(self) -> dict[str, Any]:
        """What every manifest says about the run it belongs to."""
        return {
            "global_batch_size": self.config.train.global_batch_size,
            "config_hash": config_hash(self.config),
            "plan_digest": self.plan.digest,
            "data_fingerprint": self.data.fingerprint,
        }


def train(
    config: RunConfig,
    say: Say = logger.info,
    instrument: Instrument | None = None,
    allow_batch_change: bool = False,
) -> int:
    """Train, or go on training, the run that this configuration describes.

    Args:
        say: receives the few sentences a user should read.
        instrument: is given the trainer before it starts.
        allow_batch_change: go on with another global batch than the run began with.

    Returns:
        0 when the run is complete, 75 when a signal stopped it after a save.
    """
    args = guarded_arguments(config)
    run = RunFolder(Path(config.output_dir) / config.name)
    say = say if parallel.is_main() else _keep_quiet
    if note := use_one_device(args):
        say(note)
    agreement.agree(agreement.start_facts(config))
    check_folder(run, config, allow_batch_change)
    if parallel.from_main(run.model.is_dir()):
        say(f"{run.path} is complete: {run.model} holds the trained model. Nothing to do.")
        return 0
    parts = prepare(config, run, args, say)
    keyed = KeyedDropout(parts.model, parts.plan, config.seed)
    agree_on_masks(parts, keyed)
    write_description(parts)
    tracker = open_tracker(config, run, parallel.is_main())
    try:
        return fit_and_save(parts, keyed, tracker, instrument)
    finally:
        say(tracker.finish())
        keyed.release()


def guarded_arguments(config: RunConfig) -> TrainingArguments:
    """The first statement of every run: the layout asked for is the one running, or exit 2."""
    launch = parallel.read_launch()
    engines.settle_environment(os.environ)
    without_old_collectives()
    settings = engines.Settings.of(os.environ)
    check_launch(config, settings, launch.world_size)
    quantization.require_whole_weights(config, launch.engine, settings.deepspeed)
    devices = parallel.visible_devices(config.train.use_cpu)
    parallel.require_devices(parallel.local_world_size(), devices)
    args = training_arguments(config, str(Path(config.output_dir) / config.name), launch.world_size)
    parallel.guard(launch, args.world_size, running_layout(args))
    return args


def agree_on_masks(parts: Parts, keyed: KeyedDropout) -> None:
    """All processes draw the same masks for the same samples, from the step that comes first."""
    step = checkpoint.step_of(parts.found) or 0 if parts.found else 0
    fingerprint, device = parts.data.fingerprint, parts.args.device
    agreement.agree(agreement.run_facts(keyed.plan, keyed.seed, fingerprint, step, device))


def check_folder(run: RunFolder, config: RunConfig, allow_batch_change: bool = False) -> None:
    """A folder that holds another run is refused, with what differs."""
    _check_place(run.path)
    if not run.path.exists() or not any(run.path.iterdir()):
        return
    if not run.config.is_file():
        raise RunFolderError(
            f"{run.path} exists but holds no {run.config.name}, so it is not a run of Masklock. "
            "Choose another name or output_dir, or delete the folder."
        )
    free = ("global_batch_size",) if allow_batch_change else ()
    differences = config_diff(as_before(load_config(run.path), config, free), config)
    if differences:
        listed = "\n".join(f"  - {line}" for line in differences)
        batch = any("train.global_batch_size" in line for line in differences)
        raise RunFolderError(
            f"{run.path} holds a run with another configuration (there -> asked for):\n{listed}\n"
            "Choose another name, delete the folder, or undo these changes to go on with that run."
            + ALLOW_BATCH_CHANGE
            * batch
        )


def _check_place(folder: Path) -> None:
    """The folder, or the nearest one above it that exists, must take what the run writes."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        fault = f"{place} is a file"
    elif not os.access(place, os.W_OK | os.X_OK):
        fault = f"you may not write to {place}"
    else:
        return
    raise RunFolderError(
        f"The run was to be written to {folder}, but {fault}. Choose another name or output_dir."
    )


def as_before(before: RunConfig, config: RunConfig, also: tuple[str, ...] = ()) -> RunConfig:
    """The run's configuration with what may change between two starts taken from the new one."""
    train = {name: getattr(config.train, name) for name in (*FREE_TRAIN_FIELDS, *also)}
    sections = {name: getattr(config, name) for name in FREE_SECTIONS}
    return before.model_copy(update={**sections, "train": before.train.model_copy(update=train)})


def prepare(config: RunConfig, run: RunFolder, args: TrainingArguments, say: Say) -> Parts:
    """Data, processor, plan, model and the checkpoint to go on from: every check, no write."""
    check_metric(config.train, modality_of(config).metric_names)
    check_optimizer(args)
    with parallel.main_first():
        raw = load_raw(config)
        processor = modality_of(config).load_processor(config, raw.train)
        data = prepare_data(config, raw, processor)
        if config.data.packing:
            data = replace(data, train=packed(data.train, config.data.max_length))
            require_enough(data.train, config.train.global_batch_size)
    for note in data.notes:
        say(note)
    set_horizon(args, config.train, len(data.train), has_validation=len(data.validation) > 0)
    with engines.built_whole():
        plan = plan_for(config, data.label_names, processor).for_steps(args.max_steps)
    check_learned(plan, parallel.read_launch().engine, _zero_stage(args))
    found = find_checkpoint(run, plan, data, say)
    with engines.built_whole(unless=_is_sharded_init(args)):
        model = build_model(config, data.label_names, plan, processor)
    if config.data.packing and not _is_sharded_init(args):
        require_isolation(model, plan)
    if found is None:
        checkpoint.require_space(run.path, checkpoint_bytes(model))
    return Parts(config, run, args, data, processor, plan, model, found, say)


def _zero_stage(args: TrainingArguments) -> int:
    plugin: Any = args.deepspeed_plugin
    return int(plugin.zero_stage) if plugin is not None else 0


def _is_sharded_init(args: TrainingArguments) -> bool:
    plugin: Any = args.deepspeed_plugin
    return plugin is not None and plugin.zero3_init_flag


def find_checkpoint(run: RunFolder, plan: DropoutPlan, data: PreparedData, say: Say) -> Path | None:
    """The newest whole checkpoint, the same one on every process; torn ones are named."""
    found, passed_over = parallel.from_main(
        checkpoint.newest_whole(run.path) if parallel.is_main() else None
    )
    for message in passed_over:
        say(message)
    if found is None:
        return None
    manifest = checkpoint.read_manifest(found)
    now = {"plan_digest": plan.digest, "data_fingerprint": data.fingerprint}
    changed = [name for name, value in now.items() if manifest.get(name, value) != value]
    if changed:
        raise RunFolderError(
            f"{found} was made with another {' and '.join(changed)}: the data files or the "
            "installed libraries changed since. Going on would mix two runs: choose another name."
        )
    say(f"Going on from {found}.")
    return found


def checkpoint_bytes(model: Any) -> int:
    """About what a checkpoint takes: saved weights and two moments of each trained weight."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    is_adapter = hasattr(model, "peft_config")
    saved = sum(
        p.numel() * p.element_size() for p in parameters if p.requires_grad or not is_adapter
    )
    return saved + 8 * trained


def write_description(parts: Parts) -> None:
    """The first writes of a run: what it is, for every later stage."""
    if parallel.is_main():
        write_text(parts.run.config, dump_config(parts.config))
        write_json(parts.run.plan, parts.plan.to_json())
        if parts.data.label_names is not None:
            write_json(parts.run.labels, list(parts.data.label_names))
        if parts.data.set_aside:
            write_jsonl(parts.run.quarantine, [one.to_json() for one in parts.data.set_aside])
    parallel.barrier()


def fit_and_save(
    parts: Parts, keyed: KeyedDropout, tracker: Tracker, instrument: Instrument | None = None
) -> int:
    """Train under the ears of the signal handler; save the model unless the run was stopped."""
    tracker.start(parts.config.model_dump(mode="json"), parts.config.name)
    tracker.rewind(checkpoint.step_of(parts.found) or 0 if parts.found else 0)
    stop = StopPolitely(parts.say)
    trainer = make_trainer(parts, keyed, tracker, stop)
    if instrument is not None:
        instrument(trainer)
    for note in notes_on_going_on(parts, trainer):
        parts.say(note)
    with stop.listening():
        trainer.run_from(parts.found)
    if stop.has_stopped:
        step = trainer.state.global_step
        parts.say(
            f"Stopped and saved after step {step} of {parts.args.max_steps}. "
            "Run the same command again to go on."
        )
        return STOPPED
    save_model(parts, trainer)
    return 0


def notes_on_going_on(parts: Parts, trainer: LockedTrainer) -> list[str]:
    """What a checkpoint of another layout or batch does not carry over."""
    if parts.found is None:
        return []
    notes, batch = [], parts.config.train.global_batch_size
    manifest = checkpoint.read_manifest(parts.found)
    if not trainer.carries_optimizer(parts.found):
        notes.append(
            f"{parts.found.name} was written by {zero.family(manifest.get('zero_stage'))}, whose "
            "optimizer state cannot be read here: weights, step and schedule go on, the "
            "optimizer's moments begin anew."
        )
    if (before := manifest.get("global_batch_size", batch)) != batch:
        notes.append(
            f"The global batch changes from {before} to {batch}: step k now takes the rows from "
            f"k x {batch} on, so some rows of this epoch come twice or not at all."
        )
    return notes


def make_trainer(
    parts: Parts, keyed: KeyedDropout, tracker: Tracker, stop: StopPolitely
) -> LockedTrainer:
    """The trainer with its stream and callbacks."""
    config, train, rows = parts.config, parts.config.train, parts.data.train
    meter = Meter()
    steps_per_epoch = len(rows) // train.global_batch_size
    callbacks = [
        stop,
        TrackMetrics(tracker, meter, train.global_batch_size, steps_per_epoch),
        ShowProgress(parts.say, train.disable_tqdm),
    ]
    if train.early_stopping_patience is not None:
        callbacks.append(
            EarlyStoppingCallback(train.early_stopping_patience, train.early_stopping_threshold)
        )
    modality = modality_of(config)
    return LockedTrainer(
        run=parts.run,
        train=train,
        keyed=keyed,
        modality=modality,
        facts=parts.facts,
        checkpoint_bytes=checkpoint_bytes(parts.model),
        meter=meter,
        model=parts.model,
        args=parts.args,
        train_dataset=training_stream(config, rows, parts.args.max_steps),
        eval_dataset=parts.data.validation,
        data_collator=modality.collator(parts.processor, config),
        callbacks=callbacks,
    )


def save_model(parts: Parts, trainer: LockedTrainer) -> None:
    """The final (or best) weights and the processor, under their name only once they are whole."""
    run, best = parts.run, None
    if parts.config.train.load_best_model_at_end:
        best = trainer.load_best()
    unfinished = run.path / f".{run.model.name}.unfinished"
    if parallel.is_main() and unfinished.exists():
        shutil.rmtree(unfinished)
    parallel.barrier()
    trainer.export(unfinished)
    if parallel.is_main():
        parts.processor.save_pretrained(unfinished)
        checkpoint.flush_tree(unfinished)
        os.replace(unfinished, run.model)
    parallel.barrier()
    origin = f"the best evaluation ({best.name})" if best else f"step {trainer.state.global_step}"
    parts.say(f"The model of {origin} is in {run.model}.")


def _keep_quiet(message: str) -> None:
    """Only the main process speaks."""
