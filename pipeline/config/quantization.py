"""Checks of `model.quantization_config` against the installed transformers, without weights."""

import inspect
from collections.abc import Mapping
from typing import Any

from pipeline.config.problems import nearest
from pipeline.config.strict_yaml import KeyPath

_PLACE: KeyPath = ("model", "quantization_config")
_BITSANDBYTES = "bitsandbytes"


def quantization_problems(given: Mapping[str, Any]) -> list[tuple[KeyPath, str]]:
    """Every problem of the section: its method, its fields, and what the class refuses.

    Whether the method's package is installed is asked where weights are loaded: another machine may
    train.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    classes = dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    classes[_BITSANDBYTES] = classes.pop("bitsandbytes_4bit")
    classes.pop("bitsandbytes_8bit")
    method = given.get("quant_method")
    if method not in classes:
        found = "is missing" if method is None else f"the installed transformers has no {method!r}"
        hint = nearest(str(method), classes) or f"; known: {', '.join(sorted(classes))}"
        return [((*_PLACE, "quant_method"), found + hint)]
    values = {key: value for key, value in given.items() if key != "quant_method"}
    return _field_problems(classes[method], values) or _construction_problem(classes[method], given)


def _field_problems(cls: Any, values: Mapping[str, Any]) -> list[tuple[KeyPath, str]]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    return [
        ((*_PLACE, key), f"{cls.__name__} has no such field{_hint(key, named)}")
        for key in values
        if key not in named
    ]


def _hint(key: str, named: list[str]) -> str:
    return nearest(key, named) or f"; it has: {', '.join(sorted(named))}"


def _construction_problem(cls: Any, given: Mapping[str, Any]) -> list[tuple[KeyPath, str]]:
    """What the class checks itself when it is made."""
    if given["quant_method"] == _BITSANDBYTES and not (
        given.get("load_in_4bit") or given.get("load_in_8bit")
    ):
        return [(_PLACE, "set load_in_4bit or load_in_8bit to true: nothing would be quantized")]
    try:
        cls.from_dict(dict(given))
    except ImportError:
        return []
    except Exception as error:  # whatever a library's class says of values it does not like
        if "to be installed" in str(error):
            return []
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        return [(_PLACE, f"{cls.__name__} refuses these values: {said}")]
    return []
