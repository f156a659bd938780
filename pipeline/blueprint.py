"""What the dropout plan needs of a model that is not loaded.

The model is built from its configuration alone, on the `meta` device where its forward runs there:
no weight is read, so that a plan costs a fraction of a second.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.adapter import peft_config_of, with_adapter
from pipeline.config.schema import RunConfig
from pipeline.dropout.attention import KEYED, uses_interface
from pipeline.dropout.doors import site_names
from pipeline.dropout.plan import Blueprint
from pipeline.dropout.sites import ROLE_OF_ATTRIBUTE
from pipeline.errors import ModelError
from pipeline.modality.bundle import modality_of
from pipeline.modality.weightless import without_value_checks
from pipeline.model_config import auto_class, modelling_source, set_rates

_LARGEST_CPU_TRACE = 1_500_000_000


def _rate_fields(config: RunConfig, hf_config: PreTrainedConfig) -> dict[str, float | None]:
    """The rate-carrying fields of model and adapter, with their own rates."""
    fields: dict[str, float | None] = {}
    for prefix, part in (("", hf_config), *_nested(hf_config)):
        for name in part.to_dict():
            value = getattr(part, name, None)
            is_rate = value is None or isinstance(value, int | float)
            if name in ROLE_OF_ATTRIBUTE and is_rate and _takes_fractions(part, name):
                fields[prefix + name] = value
    if config.peft is not None:
        own = config.dropout.rates().get("adapter")
        given = (config.peft.model_extra or {}).get("lora_dropout", 0.0)
        if hasattr(peft_config_of(config), "lora_dropout"):
            fields["lora_dropout"] = own if own is not None else given
    return fields


def _nested(hf_config: PreTrainedConfig) -> list[tuple[str, PreTrainedConfig]]:
    """Configurations of a model's parts (`text_config.`, `attn_config.`)."""
    parts = vars(hf_config).items()
    return [(f"{name}.", part) for name, part in parts if isinstance(part, PreTrainedConfig)]


def _takes_fractions(hf_config: PreTrainedConfig, name: str) -> bool:
    """Configurations check types, and some declare a rate as a whole number."""
    if name == "mask_feature_prob" and not hasattr(hf_config, "mask_feature_min_masks"):
        return False  # WavLM cannot mask features: it lacks a field that it would read
    try:
        setattr(copy.copy(hf_config), name, 0.5)
    except Exception:
        return False
    return True


def blueprint_of(config: RunConfig, hf_config: PreTrainedConfig) -> Blueprint:
    """The blueprint of a run's model.

    Raises:
        ModelError: the model cannot be built or traced as configured.
    """
    modality = modality_of(config)
    _check_direction(config, hf_config)
    fields = _rate_fields(config, hf_config)
    skeleton = _skeleton(config, hf_config, fields, "meta")
    _check_length(config, hf_config, skeleton)
    _check_attention(config, hf_config, skeleton)
    device = _trace_device(hf_config, skeleton, modality.example)

    def build(rates: Mapping[str, float | None]) -> nn.Module:
        return _skeleton(config, hf_config, rates, device)

    def build_keyed(rates: Mapping[str, float | None]) -> nn.Module:
        return _skeleton(config, hf_config, rates, device, KEYED)

    def example(batch_size: int, length: int) -> dict[str, Any]:
        return modality.example(hf_config, batch_size, length, device)

    return Blueprint(
        build=build,
        example=example,
        defaults=fields,
        body_prefix=_body_name(skeleton),
        has_classification_head=modality.needs_labels,
        insertable=_insertable,
        attention_refusal=_attention_refusal(config.model.attn_implementation),
        build_keyed=build_keyed if config.model.attn_implementation in (None, KEYED) else None,
        channels=tuple(config.model.channels),
    )


def _body_name(skeleton: nn.Module) -> str:
    """Of the part below the head; in Whisper's classifier that is the encoder alone."""
    prefix: str = getattr(skeleton, "base_model_prefix", "")
    return "encoder" if not hasattr(skeleton, prefix) and hasattr(skeleton, "encoder") else prefix


def _attention_refusal(implementation: str | None) -> str:
    if implementation in (None, "eager", KEYED):
        return ""
    return (
        f"model.attn_implementation is {implementation}, whose fused kernel draws its own masks; "
        "leave it out (or use `attn_implementation: eager`), or set dropout.attention to 0"
    )


def _check_attention(config: RunConfig, hf_config: PreTrainedConfig, skeleton: nn.Module) -> None:
    """The implementation asked for exists, for this model and on this machine.

    One named `owner/kernel` is fetched from the hub when the model is loaded.
    """
    asked = config.model.attn_implementation
    if asked == KEYED and not uses_interface(skeleton):
        raise ModelError(
            f"model.attn_implementation is {KEYED}, but {hf_config.model_type} does not compute "
            "its attention through transformers' interface. Leave it out: eager then serves."
        )
    if asked in (None, "eager", KEYED) or "/" in asked:
        return
    try:
        with torch.device("meta"):
            auto_class(config).from_config(copy.deepcopy(hf_config), attn_implementation=asked)
    except (ValueError, ImportError) as error:
        first_line = str(error).strip().partition("\n")[0].rstrip(".")
        raise ModelError(
            f"model.attn_implementation is {asked}, which {hf_config.model_type} cannot use here: "
            f"{first_line}. Leave it out, or use eager or sdpa."
        ) from error


def _check_direction(config: RunConfig, hf_config: PreTrainedConfig) -> None:
    """A BERT reads in both directions unless told otherwise: it would see what it is to predict."""
    if config.model.task != "text-generation" or getattr(hf_config, "is_decoder", True):
        return
    if re.search(r"not (self\.)?config\.is_decoder", modelling_source(config, hf_config)):
        raise ModelError(
            f"{hf_config.model_type} reads text in both directions: in text-generation it would "
            "see the words it is to predict. Set model.config_overrides.is_decoder to true, or "
            "choose a causal model, such as gpt2, llama or qwen3."
        )


def _skeleton(
    config: RunConfig,
    hf_config: PreTrainedConfig,
    rates: Mapping[str, float | None],
    device: str,
    attention: str = "eager",
) -> nn.Module:
    tagged = copy.deepcopy(hf_config)
    set_rates(tagged, rates)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            model = auto_class(config).from_config(tagged, attn_implementation=attention)
        except Exception as error:  # whatever a modelling file says of a configuration
            first_line = str(error).strip().partition("\n")[0].rstrip(".")
            raise ModelError(
                f"{hf_config.model_type} cannot be built for {config.model.task}: {first_line}. "
                "Check model.config_overrides, or choose another model."
            ) from error
        if device == "meta":
            without_value_checks(model)
        return with_adapter(config, model, rates)


def _check_length(config: RunConfig, hf_config: PreTrainedConfig, skeleton: nn.Module) -> None:
    inner = [part for _, part in _nested(hf_config)] if config.model.channels else []
    parts = [hf_config.get_text_config(), *inner]
    limits = [getattr(part, "max_position_embeddings", None) for part in parts]
    longest = min((limit for limit in limits if limit is not None and limit >= 0), default=None)
    if longest is None:
        return
    for name, module in skeleton.named_modules():
        is_table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if is_table and module.padding_idx is not None:  # RoBERTa's positions begin behind padding
            longest -= module.padding_idx + 1
    if config.data.max_length > longest:
        raise ModelError(
            f"data.max_length is {config.data.max_length}, but the model allows {longest} "
            f"positions; set data.max_length to at most {longest}."
        )


def _trace_device(hf_config: PreTrainedConfig, skeleton: nn.Module, example: Any) -> str:
    """`meta` where the forward runs without data, else the CPU for models that fit."""
    try:
        skeleton(**example(hf_config, 2, 4, "meta"))
        return "meta"
    except Exception as error:  # whatever a modelling file does with the values of its inputs
        size = sum(p.numel() for p in skeleton.parameters())
        if size > _LARGEST_CPU_TRACE:
            raise ModelError(
                f"{hf_config.model_type} cannot be traced without its weights ({error}), and with "
                f"{size:,} parameters it is too large to be built for tracing."
            ) from error
        return "cpu"


def _insertable(model: nn.Module) -> dict[str, list[str]]:
    by_module = site_names(model)
    names = by_module.values()
    return {
        "embedding": [n for n in names if n.rsplit(".", 1)[-1] == "embed_tokens"],
        "hidden": [
            n for n in names if n.rsplit(".", 1)[-1] in ("self_attn", "mlp") and "layers." in n
        ],
        "patch": [
            n
            for module, n in by_module.items()
            if type(module).__name__.endswith("PatchEmbeddings")
        ],
        "head": _behind_image_layers(model, list(names)),
    }


def _behind_image_layers(model: nn.Module, names: list[str]) -> list[str]:
    """The layernorm behind the layers of an image model; of one without (BiT), its pooler."""
    if getattr(model, "main_input_name", "") != "pixel_values":
        return []
    norms = [name for name in names if re.fullmatch(r"\w+\.layernorm", name)]
    return norms or [name for name in names if re.fullmatch(r"\w+\.pooler", name)]
