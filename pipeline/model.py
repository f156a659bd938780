"""Models and tokenizers from a configuration: the plan of a model not yet loaded, the model itself, a saved run's model."""

import copy
import difflib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pipeline.config.schema import RunConfig
from pipeline.dropout.key import derive_key
from pipeline.dropout.plan import Blueprint, DropoutPlan, make_plan
from pipeline.dropout.sites import ROLE_OF_ATTRIBUTE
from pipeline.errors import ModelError
from pipeline.modality.bundle import MODALITIES
from pipeline.records import sha256_of_file

_PACKAGE = "package:"
_TRACE_LENGTH = 8
_LARGEST_CPU_TRACE = 1_500_000_000
_LABELS_UNKNOWN = ("0", "1")


def resolve(name: str) -> str:
    """Turn `package:NAME/FOLDER` into a folder of an installed package; other names stay.

    Raises:
        ModelError: the package or the folder is missing.
    """
    if not name.startswith(_PACKAGE):
        return name
    package, _, folder = name.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{name}: the Python package {package} is not installed. Install it "
            f"(`pip install {package.replace('_', '-')}`; the extra `demo` brings the quickstart's model)."
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
        hf_config = _from_scratch(model.model_type)
    else:
        hf_config = _from_pretrained(config)
    _override(hf_config, model.config_overrides)
    if MODALITIES[model.task].auto_class == "AutoModelForSequenceClassification":
        names = label_names or _LABELS_UNKNOWN
        hf_config.id2label = dict(enumerate(names))
        hf_config.label2id = {name: place for place, name in enumerate(names)}
        hf_config.problem_type = "single_label_classification"
    _check_length(config, hf_config)
    return hf_config


def plan_for(
    config: RunConfig,
    label_names: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DropoutPlan:
    """The dropout plan of a run's model, from its configuration alone."""
    hf_config = model_config(config, label_names)
    _fit_to_tokenizer(hf_config, tokenizer, config)
    return make_plan(_blueprint(config, hf_config), config.dropout)


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
        return _with_adapter(config, model, dict(plan.attributes))


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
        return _auto_class(config).from_pretrained(folder, config=hf_config, **options)
    from peft import PeftModel

    base = _load_weights(config, hf_config, plan)
    return PeftModel.from_pretrained(base, str(folder))


def load_tokenizer(config: RunConfig, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or a byte-level BPE trained on `texts` where none is named.

    A tokenizer without padding token pads with its end-of-sequence token; the attention mask hides the padding.
    """
    name = config.model.tokenizer_name_or_path or config.model.model_name_or_path
    if name is None:
        return _trained_tokenizer(texts, config.model.tokenizer_vocab_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve(name),
            revision=config.model.model_revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ModelError(_not_found("tokenizer", name, error)) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"The tokenizer {name} has neither a padding nor an end-of-sequence token; "
                "add a pad_token to its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# -- configuration ----------------------------------------------------------------------------------------------


def _from_scratch(model_type: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(model_type)
    except ValueError as error:
        known = list(transformers.CONFIG_MAPPING)
        near = difflib.get_close_matches(model_type, known, n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ModelError(
            f"model.model_type {model_type!r} is not an architecture of transformers{hint}."
        ) from error


def _from_pretrained(config: RunConfig) -> PreTrainedConfig:
    name = config.model.model_name_or_path
    assert name is not None
    try:
        return AutoConfig.from_pretrained(
            resolve(name),
            revision=config.model.model_revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ModelError(_not_found("model", name, error)) from error


def _not_found(what: str, name: str, error: Exception) -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    looked = (
        f"a folder {name!r} (none), then the hub"
        if not Path(name).is_dir()
        else f"the folder {name!r}"
    )
    network = (
        "HF_HUB_OFFLINE is set, so only the local cache was searched"
        if offline
        else "the hub was asked"
    )
    first_line = str(error).strip().splitlines()[0]
    return (
        f"The {what} {name!r} could not be loaded. Looked for: {looked}; {network}. {first_line} "
        "To work offline, download it once (`hf download NAME --local-dir FOLDER`) and give the folder, "
        "or name weights of an installed package (`package:NAME/FOLDER`)."
    )


def _override(hf_config: PreTrainedConfig, overrides: dict[str, Any]) -> None:
    known = hf_config.to_dict()
    unknown = [name for name in overrides if name not in known and not hasattr(hf_config, name)]
    if unknown:
        near = {n: difflib.get_close_matches(n, known, n=1) for n in unknown}
        listed = ", ".join(
            n + (f" (did you mean {near[n][0]}?)" if near[n] else "") for n in unknown
        )
        raise ModelError(f"model.config_overrides: {hf_config.model_type} has no {listed}.")
    hf_config.update(overrides)


def _check_length(config: RunConfig, hf_config: PreTrainedConfig) -> None:
    longest = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return
    # RoBERTa's positions begin behind the padding index, so two of its embeddings are no positions.
    offset = (
        2 if hf_config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer") else 0
    )
    if config.data.max_length > longest - offset:
        raise ModelError(
            f"data.max_length is {config.data.max_length}, but the model allows {longest - offset} positions; "
            f"set data.max_length to at most {longest - offset}."
        )


def _fit_to_tokenizer(
    hf_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, config: RunConfig
) -> None:
    if tokenizer is None:
        if getattr(hf_config, "pad_token_id", None) is None:
            hf_config.pad_token_id = 0
        return
    if config.model.model_type is not None:
        hf_config.vocab_size = len(tokenizer)
        hf_config.bos_token_id, hf_config.eos_token_id = (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
    elif len(tokenizer) > hf_config.get_text_config().vocab_size:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {hf_config.get_text_config().vocab_size}: "
            "they do not belong together; check model.tokenizer_name_or_path."
        )
    hf_config.pad_token_id = tokenizer.pad_token_id


def _planned_config(
    config: RunConfig,
    label_names: Sequence[str] | None,
    plan: DropoutPlan,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedConfig:
    hf_config = model_config(config, label_names)
    _fit_to_tokenizer(hf_config, tokenizer, config)
    _set_rates(hf_config, dict(plan.attributes))
    return hf_config


# -- the plan's blueprint ---------------------------------------------------------------------------------------


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
        if hasattr(_peft_config(config), "lora_dropout"):
            fields["lora_dropout"] = own if own is not None else given
    return fields


def _text_config(hf_config: PreTrainedConfig) -> list[tuple[str, PreTrainedConfig]]:
    text = hf_config.get_text_config()
    return [] if text is hf_config else [("text_config.", text)]


def _set_rates(hf_config: PreTrainedConfig, rates: dict[str, float | None]) -> None:
    for name, rate in rates.items():
        part, _, attribute = name.rpartition(".")
        if attribute != "lora_dropout":
            setattr(getattr(hf_config, part) if part else hf_config, attribute, rate)


def _blueprint(config: RunConfig, hf_config: PreTrainedConfig) -> Blueprint:
    device = _trace_device(config, hf_config)
    auto_class = _auto_class(config)

    def build(rates: dict[str, float | None]) -> nn.Module:
        return _skeleton(config, hf_config, rates, device)

    def example(batch_size: int) -> dict[str, Any]:
        return _example(hf_config, batch_size, device)

    body = getattr(_skeleton_class(auto_class, hf_config), "base_model_prefix", "")
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


def _skeleton_class(auto_class: Any, hf_config: PreTrainedConfig) -> Any:
    try:
        return auto_class._model_mapping[type(hf_config)]
    except KeyError:
        return auto_class


def _skeleton(
    config: RunConfig, hf_config: PreTrainedConfig, rates: dict[str, float | None], device: str
) -> nn.Module:
    tagged = copy.deepcopy(hf_config)
    _set_rates(tagged, rates)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            model = _auto_class(config).from_config(tagged, attn_implementation="eager")
        except ValueError as error:
            raise ModelError(
                f"{hf_config.model_type} cannot be built for the task {config.model.task}: {error}"
            ) from error
        return _with_adapter(config, model, rates)


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
    from pipeline.dropout.doors import site_names

    names = site_names(model).values()
    return {
        "embedding": [n for n in names if n.rsplit(".", 1)[-1] == "embed_tokens"],
        "hidden": [
            n for n in names if n.rsplit(".", 1)[-1] in ("self_attn", "mlp") and "layers." in n
        ],
    }


# -- weights ----------------------------------------------------------------------------------------------------


def _auto_class(config: RunConfig) -> Any:
    return getattr(transformers, MODALITIES[config.model.task].auto_class)


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
        return _auto_class(config).from_config(hf_config, **options)
    path = resolve(name)
    if config.model.weights_sha256 is not None:
        _check_weights(path, config.model.weights_sha256)
    try:
        return _auto_class(config).from_pretrained(
            path,
            config=hf_config,
            revision=config.model.model_revision,
            trust_remote_code=config.model.trust_remote_code,
            **options,
        )
    except OSError as error:
        raise ModelError(_not_found("model", name, error)) from error


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


def _peft_config(config: RunConfig) -> Any:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    assert config.peft is not None
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config.peft.peft_type)]
    task = {"text-classification": "SEQ_CLS", "text-generation": "CAUSAL_LM"}[config.model.task]
    return cls(**{"task_type": task, **(config.peft.model_extra or {})})


def _with_adapter(config: RunConfig, model: nn.Module, rates: dict[str, float | None]) -> nn.Module:
    if config.peft is None:
        return model
    from peft import get_peft_model

    peft_config = _peft_config(config)
    if rates.get("lora_dropout") is not None:
        peft_config.lora_dropout = rates["lora_dropout"]
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ModelError(f"peft: {error}") from error


def _trained_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", bos_token="<|end|>"
    )
