"""Finds every error of a configuration, its data and its dropout plan before weights load."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from pipeline.arguments import check_metric, check_optimizer, num_steps, training_arguments
from pipeline.config.schema import RunConfig
from pipeline.data import RawData, load_raw, prepare_data
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import InputError
from pipeline.modality.bundle import modality_of
from pipeline.model import check_weights, plan_for
from pipeline.model_config import auto_class, model_config
from pipeline.packing import require_isolation
from pipeline.quantization import require_quantizer
from pipeline.records import RunFolder
from pipeline.train import check_folder

Result = TypeVar("Result")
LARGEST_PROBE = 300_000_000
"""Parameters of a model that is built, with random weights, only to be looked at."""


def check(config: RunConfig) -> list[str]:
    """What the configuration would do, in sentences.

    Raises:
        InputError: everything that is wrong, all at once.
    """
    problems: list[str] = []
    folder = str(Path(config.output_dir) / config.name)
    modality = modality_of(config)
    _attempt(problems, lambda: check_optimizer(training_arguments(config, folder, 1)))
    _attempt(problems, lambda: check_metric(config.train, modality.metric_names))
    _attempt(problems, lambda: check_folder(RunFolder(Path(folder)), config))
    raw = _attempt(problems, lambda: load_raw(config))
    names = raw.label_names if raw else None
    planned = _attempt(problems, lambda: plan_for(config, names))
    _attempt(problems, lambda: check_weights(config))
    _attempt(problems, lambda: require_quantizer(config))
    notes = _attempt(problems, lambda: _processor_notes(config, raw)) if planned else None
    if planned and config.data.packing:
        packing = _attempt(problems, lambda: _packing_notes(config, planned))
        notes = [*(notes or []), *(packing or [])]
    if problems:
        raise InputError("\n\n".join(problems))
    assert raw is not None
    assert planned is not None
    found = [_data_line(config, raw), _plan_line(planned)]
    return [*found, *planned.notes, *raw.notes, *(notes or []), "No errors."]


def plan(config: RunConfig) -> DropoutPlan:
    """Every dropout site of the model, from its configuration alone: neither data nor weights."""
    return plan_for(config)


def _processor_notes(config: RunConfig, raw: RawData | None) -> list[str]:
    """What a processor that is named has to say; one that is still to be made fits by itself.

    Conversations are written by the chat template, which may refuse them.
    """
    model, modality = config.model, modality_of(config)
    seen = raw if config.data.is_conversation or model.channels else None
    if seen is None and model.model_name_or_path is None and model.tokenizer_name_or_path is None:
        return []
    processor = modality.load_processor(config, None if seen is None else seen.train)
    modality.fit(model_config(config, None), processor, config)
    if seen is None or not config.data.is_conversation:
        return modality.notes(processor)
    return [note for note in prepare_data(config, seen, processor).notes if note not in seen.notes]


def _packing_notes(config: RunConfig, planned: DropoutPlan) -> list[str]:
    """Whether this kind of model holds packed documents apart, tried on one with random weights."""
    hf_config = model_config(config, None)
    attention = config.model.attn_implementation or planned.attn_implementation

    def build(device: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            made: nn.Module = auto_class(config).from_config(
                copy.deepcopy(hf_config), attn_implementation=attention
            )
        return made

    if sum(p.numel() for p in build("meta").parameters()) > LARGEST_PROBE:
        return ["data.packing: this model is too large to be tried here; training tries it first."]
    require_isolation(build("cpu"), planned)
    return []


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
    if modality_of(config).one_sample_a_row and not config.data.packing:
        size = min(len(raw.train), config.data.max_train_samples or len(raw.train))
        steps = f"; {num_steps(config.train, size):,} steps of {config.train.global_batch_size}"
    return f"Data: {rows} rows{classes}{steps}."


def _plan_line(planned: DropoutPlan) -> str:
    counts: dict[str, int] = {}
    for site in planned.in_force():
        counts[site.role] = counts.get(site.role, 0) + 1
    roles = ", ".join(f"{count} {role}" for role, count in counts.items()) or "none"
    return f"Dropout sites in force: {roles} (digest {planned.digest})."
