"""A thin transformers.Trainer: keyed masks around each micro-batch, own checks and checkpoints.

Every touch point below its public surface stands in this file; a contract test names a hook that
moved.
"""

import errno
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerState
from transformers.trainer import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)

from pipeline import checkpoint, parallel, sharding, zero
from pipeline.callbacks import Meter
from pipeline.config.training import TrainConfig
from pipeline.dropout.context import ActiveMasks, KeyedDropout
from pipeline.errors import DropoutError, NonFiniteLossError
from pipeline.library_output import without_bars
from pipeline.modality.bundle import Modality
from pipeline.objective import Objective
from pipeline.records import RunFolder
from pipeline.validation import validation_sums

# Signatures this file overrides or calls, held against the installed version by tests/contract.
TOUCH_POINTS = {
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "evaluate": ("self", "eval_dataset", "ignore_keys", "metric_key_prefix"),
    "_init_training_state": (
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "_save_checkpoint": ("self", "model", "trial"),
    "create_optimizer": ("self", "model"),
    "_save": ("self", "output_dir", "state_dict"),
    "save_model": ("self", "output_dir", "_internal_call"),
    "_save_optimizer_and_scheduler": ("self", "output_dir"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "_save_rng_state": ("self", "output_dir"),
    "_load_rng_state": ("self", "checkpoint"),
    "_prepare_inputs": ("self", "inputs"),
    "_determine_best_metric": ("self", "metrics", "trial"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_load_best_model": ("self",),
    "_issue_warnings_after_load": ("self", "load_result"),
}


class LockedTrainer(Trainer):
    """Trains on the stream with masks locked to the samples.

    Args:
        run: where checkpoints go.
        train: the configuration's `train` section.
        keyed: keyed dropout bound to the model.
        modality: loss and validation metrics.
        facts: what every manifest records beside step and world size.
        checkpoint_bytes: about what a checkpoint takes on the disk.
        meter: counts the tokens of each step.
    """

    model: Any
    objective: Objective

    def __init__(
        self,
        *,
        run: RunFolder,
        train: TrainConfig,
        keyed: KeyedDropout,
        modality: Modality,
        facts: dict[str, Any],
        checkpoint_bytes: int,
        meter: Meter,
        **kwargs: Any,
    ) -> None:
        loss = modality.loss(train.label_smoothing_factor)
        self.objective = Objective(loss, train, keyed.model, len(kwargs["train_dataset"].rows))
        self._use_cache = getattr(kwargs["model"].config, "use_cache", None)
        with sharding.fsdp_on_any_device():
            super().__init__(compute_loss_func=self.objective, **kwargs)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = sharding.classes_to_shard(self.model)
        self.run, self.train_config, self.keyed, self.modality = run, train, keyed, modality
        self.facts, self.checkpoint_bytes, self.meter = facts, checkpoint_bytes, meter
        # The loss is ours: the model neither computes one nor needs the number of items.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self._is_plan_proved = self._is_exporting = False
        self.is_only_loaded = False
        self._step = 0
        self._sample_ids = torch.empty(0, dtype=torch.int64)

    # -- one micro-batch -------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward under the masks of the batch's own step and rows."""
        sample_ids = inputs.pop("sample_id")
        self._step = int(inputs.pop("mask_step")[0])
        self.meter.count_tokens(inputs, sample_ids)
        inputs, self._sample_ids, row_ids = self.objective.views(inputs, sample_ids)
        domains = inputs.pop("domain", None)
        context = self.keyed.context(
            purpose="train", index=self._step, row_ids=row_ids, domains=domains
        )
        with context as active:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._is_plan_proved:
            self._prove_plan(active)
        return loss

    def _prove_plan(self, active: ActiveMasks) -> None:
        """In the first micro-batch every planned site must have drawn, before any update."""
        if missing := self.keyed.missing(active):
            raise DropoutError(
                f"{len(missing)} planned dropout sites drew no mask in the first forward pass: "
                f"{', '.join(missing[:5])}. The update was not applied. Rates would silently not "
                "be in force: set them to 0, or report this model."
            )
        self._is_plan_proved = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The modality's loss, found finite on every process before anyone goes backward."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        is_bad = not bool(torch.isfinite(loss.detach()).all())
        if parallel.agree_any(is_bad, loss.device):
            raise self._non_finite(loss, outputs)
        return (loss, outputs) if return_outputs else loss

    def _non_finite(self, loss: Tensor, outputs: Any) -> NonFiniteLossError:
        """Name the step and the samples, of all processes."""
        mine = non_finite_rows(loss, outputs.logits, self._sample_ids)
        ids = sorted({row for rows in parallel.from_all(mine) for row in rows})
        more = f", ... ({len(ids)} in all)" if len(ids) > 20 else ""
        shown = ", ".join(map(str, ids[:20])) + more
        return NonFiniteLossError(
            f"The loss became {loss.item()} in step {self._step + 1}, for sample_id {shown}. "
            "The update was not applied. Look at these rows, lower train.learning_rate or train in "
            "float32, and run it again under another name."
        )

    def create_optimizer(self, model=None):
        """Learned dropout rates have a learning rate of their own, and no weight decay."""
        optimizer: Any = super().create_optimizer(model)
        rates = self.objective.rates
        if rates is not None:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not rates.logits]
            own = {"params": [rates.logits], "weight_decay": 0.0}
            optimizer.add_param_group(own | {"lr": rates.settings.learning_rate})
        return optimizer

    # -- validation ------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Metrics of the validation rows, each counted once on however many processes."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        sums = validation_sums(
            self.model_wrapped if self.is_deepspeed_enabled else self.model,
            rows,
            self.modality,
            self.data_collator,
            self.args.per_device_eval_batch_size,
            self._prepare_inputs,
        )
        measured = self.modality.eval_metrics(sums)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # -- checkpoints -----------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        """Save, commit by the manifest, and only then delete older ones."""
        folder = self.run.checkpoint(self.state.global_step)
        try:
            if parallel.is_main():
                checkpoint.remove(folder)  # a torn one of the same step
                if checkpoint.free_bytes(folder) < self.checkpoint_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            parallel.barrier()
            super()._save_checkpoint(model, trial)
            parallel.barrier()
            if parallel.is_main():
                self._commit(folder)
        except Exception as error:
            known = checkpoint.save_error(folder, error)
            if known is None:
                raise
            raise known from error
        parallel.barrier()

    def _commit(self, folder: Path) -> None:
        layout = {
            "step": self.state.global_step,
            "world_size": parallel.world_size(),
            "zero_stage": self.zero_stage(),
        }
        checkpoint.commit(folder, layout | self.facts)
        checkpoint.rotate(self.run.path, self.train_config.save_total_limit, self.best_checkpoint())

    def save_model(self, output_dir=None, _internal_call=False):
        """The weights of one process, whatever shards them; all processes must call it."""
        if self.is_only_loaded:  # no engine was made
            if self.args.should_save:
                self._save(output_dir)
            return
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        weights = sharding.full_weights(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
        parallel.barrier()

    def _save_optimizer_and_scheduler(self, output_dir):
        """Under FSDP the optimizer's state as that of one process, so that any number goes on."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharding.full_optimizer_state(self.model, self._plain_optimizer())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        parallel.barrier()

    def _plain_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapping."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _save(self, output_dir=None, state_dict=None):
        """Weights without the pickle of the arguments: nothing here needs unpickling to be read."""
        with without_bars(), checkpoint.module_names(self.model, unless=self._is_exporting):
            super()._save(output_dir, state_dict)
        if self.args.should_save and self.objective.rates is not None:
            self.objective.rates.save(Path(output_dir or self.run.path))
        if self.args.should_save:
            (Path(output_dir or self.run.path) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_rng_state(self, output_dir):
        """Nothing: masks and order come from keys, not from a generator's state."""

    def _load_rng_state(self, checkpoint):
        """Nothing, for the same reason."""

    # -- the best model --------------------------------------------------------------------------

    def _determine_best_metric(self, metrics, trial):
        """A new best model is saved at once, so that it can be kept whatever `save_steps` is."""
        is_new_best = super()._determine_best_metric(metrics, trial)
        if is_new_best and self.train_config.load_best_model_at_end:
            self.control.should_save = True
        return is_new_best

    def best_checkpoint(self) -> Path | None:
        """The committed checkpoint of the best evaluation so far."""
        step = self.state.best_global_step
        folder = self.run.checkpoint(step) if step else None
        return folder if folder and (folder / checkpoint.MANIFEST).is_file() else None

    def load_best(self) -> Path | None:
        """Put the best checkpoint's weights into the model."""
        best = self.best_checkpoint()
        if best is not None:
            self._load_rates(best)
        if best is not None and self.is_only_loaded:
            self._load_whole(best)
        elif best is not None and self.is_fsdp_enabled:
            sharding.load_weights(self.model, best)
        elif best is not None:
            self.state.best_model_checkpoint = str(best)
            with zero.loading_any_layout(self.carries_optimizer):
                self._load_best_model()
        return best

    def export(self, folder: Path) -> None:
        """Write the weights in Hugging Face format, configured as the model came."""
        if self._use_cache is not None:
            self.model.config.use_cache = self._use_cache  # the Trainer switched it off
        self._is_exporting = True
        try:
            self.save_model(str(folder))
        finally:
            self._is_exporting = False

    # -- going on --------------------------------------------------------------------------------

    def run_from(self, found: Path | None) -> None:
        """Train to the end from a whole checkpoint, or from the beginning."""
        if found is not None:
            self._load_rates(found)
        patience = self.train_config.early_stopping_patience
        if found and checkpoint.is_finished(found, self.args.max_steps, patience):
            self._load_whole(found)
            self.state = TrainerState.load_from_json(str(found / TRAINER_STATE_NAME))
            self.is_only_loaded = True
            return
        is_foreign = self.is_deepspeed_enabled and found and not self.carries_optimizer(found)
        if found is not None and (is_foreign or self.is_fsdp_enabled):
            self._load_whole(found)
        with zero.loading_any_layout(self.carries_optimizer):
            self.train(resume_from_checkpoint=str(found) if found else None)

    def zero_stage(self) -> int | None:
        """The stage that DeepSpeed runs, if it does."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return int(plugin.zero_stage) if plugin is not None else None

    def carries_optimizer(self, found: Path) -> bool:
        """Whether the optimizer's state of a checkpoint can be read by the engine running now."""
        stage = checkpoint.read_manifest(found).get("zero_stage")
        return zero.family(stage) == zero.family(self.zero_stage())

    def _load_whole(self, folder: Path) -> None:
        """Weights in Hugging Face format, whichever engine wrote them, before they are sharded."""
        is_fsdp, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            super()._load_from_checkpoint(str(folder))
        finally:
            self.is_fsdp_enabled = is_fsdp

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Under FSDP nothing: the weights were loaded before they were sharded."""
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result):
        """What a checkpoint holds must find its place: the Trainer would go on without it."""
        checkpoint.require_all_found(load_result.unexpected_keys)
        super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The optimizer's state where engines share it, and the schedule."""
        optimizer: Any = self._plain_optimizer()
        schedule: Any = self.lr_scheduler
        if self.is_deepspeed_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.carries_optimizer(Path(checkpoint)):
            state = _read_tensors(Path(checkpoint) / OPTIMIZER_NAME)
            if self.is_fsdp_enabled or sharding.is_by_name(state):
                bare = self.accelerator.unwrap_model(self.model)
                sharding.load_optimizer_state(bare, optimizer, state)
            else:
                optimizer.load_state_dict(state)
        schedule.load_state_dict(_read_tensors(Path(checkpoint) / SCHEDULER_NAME))

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """How often to log and save is asked now; the saved state remembers the last time's."""
        result = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.compute_steps(self.args, max_steps)
        return result

    def _load_rates(self, folder: Path) -> None:
        if self.objective.rates is not None:
            self.objective.rates.load(folder)


def _read_tensors(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def non_finite_rows(loss: Tensor, logits: Tensor, sample_ids: Tensor) -> list[int]:
    """The ids whose logits are not finite; all ids of the micro-batch when only its loss is not."""
    if bool(torch.isfinite(loss).all()):
        return []
    bad = ~torch.isfinite(logits.detach()).flatten(1).all(1)
    rows = sample_ids[bad] if bool(bad.any()) else sample_ids
    return [int(row) for row in rows.unique() if row >= 0]  # below: padding of packed rows
