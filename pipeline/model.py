"""Models from a configuration: the plan of one not yet loaded, the one a run starts from, the one a run saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pipeline.adapter import with_adapter
from pipeline.blueprint import blueprint_of
from pipeline.config.schema import RunConfig
from pipeline.dropout.key import derive_key
from pipeline.dropout.plan import DropoutPlan, make_plan
from pipeline.errors import ModelError
from pipeline.model_config import (
    auto_class,
    fit_to_tokenizer,
    model_config,
    not_found,
    resolve,
    set_rates,
)
from pipeline.records import sha256_of_file


def plan_for(
    config: RunConfig,
    label_names: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DropoutPlan:
    """The dropout plan of a run's model, from its configuration alone."""
    hf_config = model_config(config, label_names)
    fit_to_tokenizer(hf_config, tokenizer, config)
    return make_plan(blueprint_of(config, hf_config), config.dropout)


def build_model(
    config: RunConfig,
    label_names: Sequence[str] | None,
    plan: DropoutPlan,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> nn.Module:
    """Load (or initialise) the model that a run starts from, with adapters; new weights come from the run's seed."""
    hf_config = _planned_config(config, label_names, plan, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(config.seed, "init", 0, "weights", "model", 0) >> 1)
        model = _load_weights(config, hf_config, plan)
        return with_adapter(config, model, dict(plan.attributes))


def load_trained(
    folder: Path,
    config: RunConfig,
    label_names: Sequence[str] | None,
    plan: DropoutPlan,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> nn.Module:
    """The model that a run saved under `folder`: the adapter on its base, or the full weights."""
    hf_config = _planned_config(config, label_names, plan, tokenizer)
    if config.peft is None:
        options = _load_options(config, hf_config, plan)
        return auto_class(config).from_pretrained(folder, config=hf_config, **options)
    from peft import PeftModel

    base = _load_weights(config, hf_config, plan)
    return PeftModel.from_pretrained(base, str(folder))


def _planned_config(
    config: RunConfig,
    label_names: Sequence[str] | None,
    plan: DropoutPlan,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedConfig:
    hf_config = model_config(config, label_names)
    fit_to_tokenizer(hf_config, tokenizer, config)
    set_rates(hf_config, dict(plan.attributes))
    return hf_config


def _load_options(
    config: RunConfig, hf_config: PreTrainedConfig, plan: DropoutPlan
) -> dict[str, Any]:
    live_attention = any(site.role == "attention" for site in plan.in_force())
    implementation = config.model.attn_implementation or ("eager" if live_attention else None)
    return {
        "attn_implementation": implementation,
        "dtype": getattr(torch, config.model.dtype),
        "use_safetensors": True,
    }


def _load_weights(config: RunConfig, hf_config: PreTrainedConfig, plan: DropoutPlan) -> nn.Module:
    options = _load_options(config, hf_config, plan)
    name = config.model.model_name_or_path
    if name is None:
        options.pop("use_safetensors")
        return auto_class(config).from_config(hf_config, **options)
    path = resolve(name)
    if config.model.weights_sha256 is not None:
        _check_weights(path, config.model.weights_sha256)
    try:
        return auto_class(config).from_pretrained(
            path,
            config=hf_config,
            revision=config.model.model_revision,
            trust_remote_code=config.model.trust_remote_code,
            **options,
        )
    except OSError as error:
        raise ModelError(not_found("model", name, error)) from error


def _check_weights(path: str, expected: str) -> None:
    file = Path(path) / "model.safetensors"
    if not file.is_file():
        raise ModelError(
            f"model.weights_sha256 is given, but {path} has no model.safetensors to check."
        )
    found = sha256_of_file(file)
    if found != expected:
        raise ModelError(
            f"model.safetensors is not the file asked for: sha256 {found}, expected {expected}. "
            "Nothing was loaded; install the package again."
        )
