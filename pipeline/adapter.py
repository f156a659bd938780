"""Adapters of the peft library around a model, from the configuration's `peft` section.

The section is any configuration of peft: every method it has is ours without a line of code.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError
from pipeline.library_output import without_old_names

_TASK_TYPES = {"text-classification": "SEQ_CLS", "text-generation": "CAUSAL_LM"}


def peft_config_of(config: RunConfig) -> Any:
    """The section as an object of peft."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    assert config.peft is not None
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config.peft.peft_type)]
    task = _TASK_TYPES.get(config.model.task)  # peft knows no images: its plain wrapper serves
    new = {"modules_to_save": ["fusion"]} if config.model.channels else {}  # begins anew: trained
    # A copy: peft appends to the lists it is given, and the configuration is frozen.
    return cls(**{"task_type": task, **new, **copy.deepcopy(config.peft.model_extra or {})})


def with_adapter(
    config: RunConfig, model: nn.Module, rates: Mapping[str, float | None]
) -> nn.Module:
    """The model with the adapter of the `peft` section around it, or as it came."""
    if config.peft is None:
        return model
    from peft import get_peft_model

    peft_config = peft_config_of(config)
    if rates.get("lora_dropout") is not None:
        peft_config.lora_dropout = rates["lora_dropout"]
    try:
        with without_old_names():
            return get_peft_model(model, peft_config)
    except Exception as error:  # each adapter refuses in its own way: None times a number, say
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"peft: the {config.peft.peft_type} adapter cannot be put on this model: {first_line} "
            "Check the fields under peft."
        ) from error
