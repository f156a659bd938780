"""Quantized base weights under an adapter (QLoRA), by whichever method transformers offers.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023. Every module keeps
its name, so that a quantized model has the sites and the masks of the plain one.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from pipeline import parallel
from pipeline.config.schema import RunConfig
from pipeline.errors import LayoutError, ModelError

_PACKS_IN_EVAL = "support_avx512bf16_for_cpu"
"""With it, an evaluation on such a CPU rounds the scales of bitsandbytes to bfloat16 for good: the
training would go on with other weights, and sizes that 64 does not divide would fail."""
_HEADS = ("classifier", "score")
"""What peft trains whole in a classifier."""
_INSTALL = {"bitsandbytes": "pip install 'masklock[quantization]'"}


def require_quantizer(config: RunConfig) -> None:
    """The method asked for is installed here, works on this machine, and can be trained through.

    Raises:
        ModelError: it is not.
    """
    if config.model.quantization_config is None:
        return
    method = config.model.quantization_config["quant_method"]
    try:
        quantizer = _quantizer(dict(config.model.quantization_config))
        quantizer.validate_environment(device_map=_device_map(config), weights_only=True)
    except Exception as error:  # each method has its own way to say that something is missing
        first_line = str(error).strip().partition("\n")[0].rstrip(".")
        install = _INSTALL.get(method, f"pip install {method}")
        raise ModelError(
            f"model.quantization_config asks for {method}, which cannot be used here: "
            f"{first_line}. Install it (`{install}`), or leave quantization_config out."
        ) from error
    if not quantizer.is_trainable:
        raise ModelError(
            f"model.quantization_config asks for {method}, through whose weights transformers "
            "cannot train an adapter. Choose another method, such as bitsandbytes."
        )


def _quantizer(given: dict[str, Any]) -> Any:
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    return AutoHfQuantizer.from_config(AutoQuantizationConfig.from_dict(given), pre_quantized=False)


def load_options(config: RunConfig, hf_config: PreTrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` is told: the section as it is, and the device of this process."""
    require_quantizer(config)
    asked = config.model.quantization_config
    if asked is None and getattr(hf_config, "quantization_config", None) is None:
        return {}
    section = {} if asked is None else {"quantization_config": _with_plain_head(config)}
    return {**section, "device_map": _device_map(config)}


def _with_plain_head(config: RunConfig) -> dict[str, Any]:
    """The section, with a classification head left as it is: it is trained whole, beside the
    adapter (transformers finds a head by its last parameter, and misses those with a bias)."""
    given = dict(config.model.quantization_config or {})
    if config.model.task != "text-classification":
        return given
    is_bitsandbytes = given["quant_method"] == "bitsandbytes"
    field = "llm_int8_skip_modules" if is_bitsandbytes else "modules_to_not_convert"
    return {**given, field: [*(given.get(field) or ()), *_HEADS]}


def _device_map(config: RunConfig) -> dict[str, Any]:
    return {"": parallel.own_device(config.train.use_cpu)}


def with_frozen_weights(config: RunConfig, model: nn.Module) -> nn.Module:
    """A quantized base as peft wants it: frozen, with what is not quantized in float32.

    Raises:
        ModelError: the weights came quantized, and nothing but they would be trained.
    """
    if not getattr(model, "is_quantized", False):
        return model
    if config.peft is None:
        raise ModelError(
            f"The weights of {config.model.model_name_or_path} are quantized and cannot be trained "
            "themselves. Add a peft section, or choose weights that are not quantized."
        )
    from peft import prepare_model_for_kbit_training

    # Recompute is the Trainer's (train.gradient_checkpointing), where it needs no such hook.
    prepared: nn.Module = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for module in prepared.modules():
        if hasattr(module, _PACKS_IN_EVAL):
            setattr(module, _PACKS_IN_EVAL, False)
    return prepared


def dequantized(model: Any) -> nn.Module:
    """A quantized base in plain weights of the values it stands for; others as they are.

    Raises:
        ModelError: the method has no way back.
    """
    if not getattr(model, "is_quantized", False):
        return model
    method = model.config.quantization_config.quant_method
    try:
        plain: nn.Module = model.dequantize()
    except NotImplementedError as error:
        raise ModelError(
            f"The base is quantized with {getattr(method, 'value', method)}, which transformers "
            "cannot turn back into plain weights to merge the adapter into. Load the adapter in "
            "the run's folder `model` on the quantized base instead."
        ) from error
    return plain


def require_whole_weights(config: RunConfig, engine: str, deepspeed: Mapping[str, Any]) -> None:
    """Refuse engines that would cut quantized weights into pieces.

    Args:
        engine: `FSDP`, `DEEPSPEED`, ... as the launcher asked for.
        deepspeed: its file, or nothing.
    """
    if config.model.quantization_config is None:
        return
    stage = deepspeed.get("zero_optimization", {}).get("stage")
    if engine == "FSDP" or stage == 3:
        raise LayoutError(
            f"model.quantization_config and {'FSDP' if engine == 'FSDP' else 'ZeRO 3'} do not go "
            "together here: quantized weights are not cut into pieces. Choose ddp, zero1 or zero2, "
            "where each process holds the whole base."
        )
