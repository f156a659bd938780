"""Models from a configuration: the plan of one not yet loaded, one to train, one that was trained.

New weights come from the run's seed, never from whatever a generator happens to hold.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig

from pipeline import quantization
from pipeline.adapter import with_adapter
from pipeline.blueprint import blueprint_of
from pipeline.config.schema import RunConfig
from pipeline.dropout.concrete import add_learned_rates, learned_rates_of
from pipeline.dropout.key import derive_key
from pipeline.dropout.noise import NEFTUNE, with_noise
from pipeline.dropout.plan import DropoutPlan, make_plan
from pipeline.encoders import pretrained_encoder
from pipeline.errors import ModelError
from pipeline.hub import not_found, resolve
from pipeline.library_output import without_load_report, without_old_names
from pipeline.modality.bundle import modality_of
from pipeline.modality.channels import channel_run, of_channel
from pipeline.model_config import auto_class, model_config, set_rates
from pipeline.records import sha256_of_file

logger = logging.getLogger(__name__)


def plan_for(
    config: RunConfig,
    label_names: Sequence[str] | None = None,
    processor: Any = None,
) -> DropoutPlan:
    """The dropout plan of a run's model, from its configuration alone."""
    hf_config = model_config(config, label_names)
    modality_of(config).fit(hf_config, processor, config)
    blueprint = blueprint_of(config, hf_config)
    plan = make_plan(blueprint, config.dropout)
    alpha = config.train.extra.get(NEFTUNE)
    return plan if alpha is None else with_noise(plan, blueprint.build(blueprint.defaults), alpha)


def build_model(
    config: RunConfig,
    label_names: Sequence[str] | None,
    plan: DropoutPlan,
    processor: Any = None,
) -> nn.Module:
    """Load (or initialise) the model that a run starts from, with its adapter.

    Raises:
        ModelError: the weights cannot be found, are not the ones asked for, or do not fit.
    """
    hf_config = _planned_config(config, label_names, plan, processor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(config.seed, "init", 0, "weights", "model", 0) >> 1)
        base = _load_weights(config, hf_config, plan)
        if (freeze := modality_of(config).freeze) is not None:
            freeze(base)
        model = with_adapter(config, base, dict(plan.attributes))
        add_learned_rates(model, plan.in_force(), config.dropout.concrete)
        return model


def load_trained(
    folder: Path,
    config: RunConfig,
    label_names: Sequence[str] | None,
    plan: DropoutPlan,
    processor: Any = None,
    dequantize: bool = False,
) -> nn.Module:
    """The model that a run saved under `folder`: the adapter on its base, or the full weights.

    Args:
        dequantize: give a quantized base plain weights of the same values.

    Raises:
        ModelError: the folder lacks weights of this model.
    """
    model = _trained_weights(folder, config, label_names, plan, processor, dequantize)
    add_learned_rates(model, plan.in_force(), config.dropout.concrete)
    if (rates := learned_rates_of(model)) is not None:
        rates.load(folder)
    return model


def _trained_weights(
    folder: Path,
    config: RunConfig,
    label_names: Sequence[str] | None,
    plan: DropoutPlan,
    processor: Any,
    dequantize: bool,
) -> nn.Module:
    hf_config = _planned_config(config, label_names, plan, processor)
    if config.peft is None:
        try:
            model, missing, mismatched = _read_weights(str(folder), config, hf_config, plan)
        except (OSError, SafetensorError) as error:
            raise _damaged(folder, error) from error
        if missing or mismatched:
            raise ModelError(
                f"{folder} was to hold the trained model, but these weights are missing or of "
                f"another shape: {_listed([*missing, *mismatched])}. Train the run again."
            )
        return model
    from peft import PeftModel

    base = _load_weights(config, hf_config, plan)
    if dequantize:
        base = quantization.dequantized(base)
    with without_old_names():
        try:
            return PeftModel.from_pretrained(base, str(folder))
        except (OSError, ValueError, SafetensorError) as error:
            raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ModelError:
    first_line = str(error).strip().partition("\n")[0]
    return ModelError(
        f"{folder} was to hold the trained model, but it cannot be read: {first_line}. Train the "
        "run again under another name, or bring the files back."
    )


def _planned_config(
    config: RunConfig,
    label_names: Sequence[str] | None,
    plan: DropoutPlan,
    processor: Any,
) -> PreTrainedConfig:
    hf_config = model_config(config, label_names)
    modality_of(config).fit(hf_config, processor, config)
    set_rates(hf_config, dict(plan.attributes))
    return hf_config


def _load_options(
    config: RunConfig, hf_config: PreTrainedConfig, plan: DropoutPlan
) -> dict[str, Any]:
    return {
        "attn_implementation": config.model.attn_implementation or plan.attn_implementation,
        "dtype": getattr(torch, config.model.dtype),
        "use_safetensors": True,
    }


def _load_weights(config: RunConfig, hf_config: PreTrainedConfig, plan: DropoutPlan) -> nn.Module:
    """The weights that the configuration names; those of a new head come from the generator."""
    name = config.model.model_name_or_path
    if name is None:
        options = _load_options(config, hf_config, plan)
        if config.model.channels:
            options["encoders"] = _named_encoders(config, hf_config, options)
        options.pop("use_safetensors")
        return auto_class(config).from_config(hf_config, **options)
    path = resolve(name)
    check_weights(config)
    try:
        model, missing, mismatched = _read_weights(path, config, hf_config, plan)
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        raise ModelError(not_found("model", name, error)) from error
    _tell_new_weights(model, name, missing, mismatched)
    return quantization.with_frozen_weights(config, model)


def _named_encoders(
    config: RunConfig, hf_config: Any, options: dict[str, Any]
) -> dict[str, nn.Module]:
    """The encoders of channels that name weights, with these."""
    found = {}
    for name, channel in config.model.channels.items():
        if channel.model_name_or_path is not None:
            with of_channel(name):
                found[name] = _named_encoder(channel_run(config, name), hf_config, name, options)
    return found


def _named_encoder(
    config: RunConfig, hf_config: Any, channel: str, options: dict[str, Any]
) -> nn.Module:
    name, modality = config.model.model_name_or_path, hf_config.channels[channel]
    assert name is not None
    revision = {"revision": config.model.model_revision}
    try:
        with without_load_report():
            encoder, missing = pretrained_encoder(
                resolve(name), hf_config.of_channel(channel), modality, **revision, **options
            )
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(not_found("model", name, error)) from error
    if missing:
        logger.warning("Not in the weights of %s, so these start anew: %s.", name, _listed(missing))
    return encoder


def _read_weights(
    path: str, config: RunConfig, hf_config: PreTrainedConfig, plan: DropoutPlan
) -> tuple[nn.Module, list[str], list[str]]:
    """The model, the weights that its file lacks, and those that have another shape there."""
    with without_load_report():
        model, found = auto_class(config).from_pretrained(
            path,
            config=hf_config,
            revision=config.model.model_revision,
            trust_remote_code=config.model.trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_load_options(config, hf_config, plan),
            **quantization.load_options(config, hf_config),
        )
    mismatched = [
        f"{key} ({list(there)}, here {list(here)})" for key, there, here in found["mismatched_keys"]
    ]
    return model, sorted(found["missing_keys"]), sorted(mismatched)


def _tell_new_weights(
    model: nn.Module, name: str, missing: list[str], mismatched: list[str]
) -> None:
    """A new head is expected; a new part of the body is not, and one of another shape is wrong."""
    body = f"{getattr(model, 'base_model_prefix', '')}."
    if wrong := [entry for entry in mismatched if entry.startswith(body)]:
        raise ModelError(
            f"The weights of {name} have other shapes than model.config_overrides asks for: "
            f"{_listed(wrong)}."
        )
    if mismatched:
        logger.warning(
            "The head of %s has another shape and starts anew: %s.", name, _listed(mismatched)
        )
    if new := [key for key in missing if key.startswith(body)]:
        logger.warning("Not in the weights of %s, so these start anew: %s.", name, _listed(new))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def check_weights(config: RunConfig) -> None:
    """The file of the weights is the one asked for, where its sha256 is given.

    Raises:
        ModelError: it is another one, or not there.
    """
    expected, name = config.model.weights_sha256, config.model.model_name_or_path
    if expected is None or name is None:
        return
    path = resolve(name)
    file = Path(path) / "model.safetensors"
    if not file.is_file():
        raise ModelError(
            f"model.weights_sha256 is given, but {path} has no model.safetensors to check. Give "
            "the folder of a downloaded model, or leave weights_sha256 out."
        )
    found = sha256_of_file(file)
    if found != expected:
        raise ModelError(
            f"{file} is not the file asked for: its sha256 is {found}, model.weights_sha256 is "
            f"{expected}. Nothing was loaded: get the file again, or correct the sha256."
        )
