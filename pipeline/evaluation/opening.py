"""A trained run opened for prediction: its plan, its model with the doors open, its predictor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline import engines, parallel
from pipeline.config.load import config_diff, load_config
from pipeline.config.schema import RunConfig
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import ConfigError, RunFolderError
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.evaluation.predict import Predictor
from pipeline.modality.bundle import modality_of
from pipeline.records import RunFolder
from pipeline.trained import trained_model

# What a run's saved weights and plan have settled; only how they are run may still be changed.
_SETTLED = ("model.", "peft", "dropout.")
_OPEN = ("model.attn_implementation", "model.dtype", "model.trust_remote_code", "dropout.strict")


@contextmanager
def processes(config: RunConfig) -> Iterator[None]:
    """Connect the processes that share out the rows, if there are several."""
    parallel.require_devices(
        parallel.local_world_size(), parallel.visible_devices(config.train.use_cpu)
    )
    with parallel.exchanging(parallel.read_launch()):
        yield


def read_plan(run: RunFolder, config: RunConfig) -> DropoutPlan:
    """The plan of a finished training, if the configuration is still the training's.

    Raises:
        RunFolderError: the training has not finished.
        ConfigError: what the training settled has changed since.
    """
    if not run.plan.is_file() or not run.model.is_dir():
        raise RunFolderError(
            f"{run.path} was to hold a trained model, but {run.plan.name} or {run.model.name}/ is "
            f"missing: its training has not finished. Train it first: `masklock train {run.path}`."
        )
    if run.config.is_file():
        differences = config_diff(load_config(run.path), config)
        settled = [d for d in differences if d.startswith(_SETTLED) and not d.startswith(_OPEN)]
        if settled:
            raise ConfigError(
                [f"{one}: settled by the training" for one in settled],
                f"evaluation of {run.path} (leave these as they were, or train another run)",
            )
    return DropoutPlan.read(run.plan)


def open_predictor(
    run: RunFolder, config: RunConfig, plan: DropoutPlan, processor: Any
) -> Predictor:
    """The run's model on this process's device, its masks keyed by the run's seed."""
    with engines.unsharded():
        model = trained_model(run, config, plan, processor)
    model.to(parallel.own_device(config.train.use_cpu))
    keyed = KeyedDropout(model, plan, config.seed)
    passes = config.evaluation.num_mc_passes
    return Predictor(
        model,
        modality_of(config).collator(processor, config),
        MonteCarlo(keyed, passes, strict=config.dropout.strict),
        batch_size=config.evaluation.batch_size,
        predicts=modality_of(config).predicts,
        lengths=modality_of(config).lengths,
    )
