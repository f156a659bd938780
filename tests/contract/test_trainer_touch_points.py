"""Names the hook that moved when transformers or accelerate changes under pipeline/trainer.py."""

import inspect

import pytest
import transformers
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerState
from transformers import trainer as module

from pipeline.trainer import TOUCH_POINTS, LockedTrainer


@pytest.mark.parametrize(("name", "parameters"), TOUCH_POINTS.items())
def test_a_method_below_the_surface_has_the_parameters_we_use(name, parameters):
    assert tuple(inspect.signature(getattr(Trainer, name)).parameters) == parameters


def test_every_override_of_ours_is_a_listed_touch_point():
    ours = {name for name, value in vars(LockedTrainer).items() if inspect.isfunction(value)}
    assert {name for name in ours if hasattr(Trainer, name)} - {"__init__"} <= set(TOUCH_POINTS)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("training_step", "self.compute_loss(model, inputs, num_items_in_batch=num_items"),
        ("compute_loss", "self.compute_loss_func("),
        ("_run_epoch", "self.training_step(model, inputs, num_items_in_batch)"),
        ("_maybe_log_save_evaluate", "self._determine_best_metric(metrics=metrics, trial=trial)"),
        ("_maybe_log_save_evaluate", "self._save_checkpoint(model, trial)"),
        ("_save_checkpoint", "self._save_rng_state(output_dir)"),
        ("_save_checkpoint", "save_total_limit=self.args.save_total_limit"),
        ("_save", "torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))"),
        ("_load_best_model", "self.state.best_model_checkpoint"),
        ("_load_best_model", "deepspeed_load_checkpoint("),
        ("_prepare_for_training", "deepspeed_load_checkpoint("),
        ("_prepare_for_training", "self._load_from_checkpoint(resume_from_checkpoint"),
        ("create_accelerator_and_postprocess", "self.is_fsdp_enabled = getattr("),
        ("_load_optimizer_and_scheduler", "weights_only=True"),
        ("_init_training_state", "steps_trained_in_current_epoch"),
    ],
)
def test_the_trainer_still_calls_our_hook_in_the_way_we_count_on(method, words):
    assert words in inspect.getsource(getattr(Trainer, method))


def test_attributes_and_names_that_we_set_or_read_are_there():
    source = inspect.getsource(Trainer)
    for name in ("model_accepts_loss_kwargs", "model_wrapped", "is_deepspeed_enabled"):
        assert f"self.{name}" in source
    assert module.TRAINER_STATE_NAME == "trainer_state.json"
    assert module.TRAINING_ARGS_NAME == "training_args.bin"
    assert hasattr(TrainerState(), "best_global_step")
    assert inspect.signature(AcceleratorState._reset_state).parameters


def test_the_tested_minor_is_the_installed_one():
    assert transformers.__version__.startswith("5.24.")
