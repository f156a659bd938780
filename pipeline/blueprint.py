"""What the dropout plan needs of a model that is not loaded: built from its configuration, on no device at all."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.adapter import peft_config_of, with_adapter
from pipeline.config.schema import RunConfig
from pipeline.dropout.doors import site_names
from pipeline.dropout.plan import Blueprint
from pipeline.dropout.sites import ROLE_OF_ATTRIBUTE
from pipeline.errors import ModelError
from pipeline.model_config import auto_class, set_rates

_TRACE_LENGTH = 8
_LARGEST_CPU_TRACE = 1_500_000_000


def _rate_fields(config: RunConfig, hf_config: PreTrainedConfig) -> dict[str, float | None]:
    """The rate-carrying fields of the model's and the adapter's configuration, with their own rates."""
    fields: dict[str, float | None] = {}
    for prefix, part in (("", hf_config), *_text_config(hf_config)):
        for name in part.to_dict():
            value = getattr(part, name, None)
            if name in ROLE_OF_ATTRIBUTE and (value is None or isinstance(value, int | float)):
                fields[prefix + name] = value
    if config.peft is not None:
        own = config.dropout.adapter
        given = (config.peft.model_extra or {}).get("lora_dropout", 0.0)
        if hasattr(peft_config_of(config), "lora_dropout"):
            fields["lora_dropout"] = own if own is not None else given
    return fields


def _text_config(hf_config: PreTrainedConfig) -> list[tuple[str, PreTrainedConfig]]:
    text = hf_config.get_text_config()
    return [] if text is hf_config else [("text_config.", text)]


def blueprint_of(config: RunConfig, hf_config: PreTrainedConfig) -> Blueprint:
    device = _trace_device(config, hf_config)

    def build(rates: dict[str, float | None]) -> nn.Module:
        return _skeleton(config, hf_config, rates, device)

    def example(batch_size: int) -> dict[str, Any]:
        return _example(hf_config, batch_size, device)

    body = getattr(_skeleton_class(auto_class(config), hf_config), "base_model_prefix", "")
    is_classifier = config.model.task == "text-classification"
    return Blueprint(
        build=build,
        example=example,
        defaults=_rate_fields(config, hf_config),
        body_prefix=body,
        has_classification_head=is_classifier,
        insertable=_insertable,
        attention_refusal=_attention_refusal(config.model.attn_implementation),
    )


def _attention_refusal(implementation: str | None) -> str:
    if implementation in (None, "eager"):
        return ""
    return (
        f"model.attn_implementation is {implementation}, whose fused kernel draws its own masks; use "
        "`attn_implementation: eager`, or set dropout.attention to 0"
    )


def _skeleton_class(automatic: Any, hf_config: PreTrainedConfig) -> Any:
    try:
        return automatic._model_mapping[type(hf_config)]
    except KeyError:
        return automatic


def _skeleton(
    config: RunConfig, hf_config: PreTrainedConfig, rates: dict[str, float | None], device: str
) -> nn.Module:
    tagged = copy.deepcopy(hf_config)
    set_rates(tagged, rates)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            model = auto_class(config).from_config(tagged, attn_implementation="eager")
        except ValueError as error:
            raise ModelError(
                f"{hf_config.model_type} cannot be built for the task {config.model.task}: {error}"
            ) from error
        return with_adapter(config, model, rates)


def _trace_device(config: RunConfig, hf_config: PreTrainedConfig) -> str:
    """`meta` where the forward runs without data, else the CPU for models that fit."""
    rates = _rate_fields(config, hf_config)
    model = _skeleton(config, hf_config, rates, "meta")
    try:
        model(**_example(hf_config, 2, "meta"))
        return "meta"
    except Exception as error:  # noqa: BLE001 - whatever a modelling file does with the values of its inputs
        size = sum(p.numel() for p in model.parameters())
        if size > _LARGEST_CPU_TRACE:
            raise ModelError(
                f"{hf_config.model_type} cannot be traced without its weights ({error}), and with "
                f"{size:,} parameters it is too large to be built for tracing."
            ) from error
        return "cpu"


def _example(hf_config: PreTrainedConfig, batch_size: int, device: str) -> dict[str, Any]:
    ids = torch.ones(batch_size, _TRACE_LENGTH, dtype=torch.long, device=device)
    if device != "meta" and isinstance(hf_config.eos_token_id, int):
        ids[:, -1] = hf_config.eos_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _insertable(model: nn.Module) -> dict[str, list[str]]:
    names = site_names(model).values()
    return {
        "embedding": [n for n in names if n.rsplit(".", 1)[-1] == "embed_tokens"],
        "hidden": [
            n for n in names if n.rsplit(".", 1)[-1] in ("self_attn", "mlp") and "layers." in n
        ],
    }
