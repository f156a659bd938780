"""Finds every error of a configuration, its data and its dropout plan before weights load."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.arguments import check_metric, check_optimizer, num_steps, training_arguments
from pipeline.config.schema import RunConfig
from pipeline.data import RawData, load_raw
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import InputError
from pipeline.modality.bundle import MODALITIES
from pipeline.model import check_weights, plan_for
from pipeline.model_config import fit_to_tokenizer, model_config
from pipeline.quantization import require_quantizer
from pipeline.records import RunFolder
from pipeline.tokenizer import load_tokenizer
from pipeline.train import check_folder

Result = TypeVar("Result")


def check(config: RunConfig) -> list[str]:
    """What the configuration would do, in sentences.

    Raises:
        InputError: everything that is wrong, all at once.
    """
    problems: list[str] = []
    folder = str(Path(config.output_dir) / config.name)
    modality = MODALITIES[config.model.task]
    _attempt(problems, lambda: check_optimizer(training_arguments(config, folder, 1)))
    _attempt(problems, lambda: check_metric(config.train, modality.metric_names))
    _attempt(problems, lambda: check_folder(RunFolder(Path(folder)), config))
    raw = _attempt(problems, lambda: load_raw(config))
    names = raw.label_names if raw else None
    planned = _attempt(problems, lambda: plan_for(config, names))
    _attempt(problems, lambda: check_weights(config))
    _attempt(problems, lambda: require_quantizer(config))
    notes = _attempt(problems, lambda: _tokenizer_notes(config)) if planned else None
    if problems:
        raise InputError("\n\n".join(problems))
    assert raw is not None
    assert planned is not None
    found = [_data_line(config, raw), _plan_line(planned)]
    return [*found, *planned.notes, *raw.notes, *(notes or []), "No errors."]


def plan(config: RunConfig) -> DropoutPlan:
    """Every dropout site of the model, from its configuration alone: neither data nor weights."""
    return plan_for(config)


def _tokenizer_notes(config: RunConfig) -> list[str]:
    """What a tokenizer that is named has to say; one that is still to be trained fits by itself."""
    if config.model.model_name_or_path is None and config.model.tokenizer_name_or_path is None:
        return []
    tokenizer = load_tokenizer(config, [])
    notes = MODALITIES[config.model.task].notes(tokenizer)
    fit_to_tokenizer(model_config(config, None), tokenizer, config)
    return notes


def _attempt(problems: list[str], action: Callable[[], Result]) -> Result | None:
    try:
        return action()
    except InputError as error:
        problems.append(str(error))
        return None


def _data_line(config: RunConfig, raw: RawData) -> str:
    sets = {"train": raw.train, "validation": raw.validation, "test": raw.test} | {
        f"ood {name}": rows for name, rows in raw.ood.items()
    }
    rows = ", ".join(f"{len(part):,} {name}" for name, part in sets.items())
    classes = f", {len(raw.label_names)} classes" if raw.label_names else ""
    steps = ""
    if MODALITIES[config.model.task].one_sample_a_row:
        size = min(len(raw.train), config.data.max_train_samples or len(raw.train))
        steps = f"; {num_steps(config.train, size):,} steps of {config.train.global_batch_size}"
    return f"Data: {rows} rows{classes}{steps}."


def _plan_line(planned: DropoutPlan) -> str:
    counts: dict[str, int] = {}
    for site in planned.in_force():
        counts[site.role] = counts.get(site.role, 0) + 1
    roles = ", ".join(f"{count} {role}" for role, count in counts.items()) or "none"
    return f"Dropout sites in force: {roles} (digest {planned.digest})."
