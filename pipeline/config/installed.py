"""Checks what only the installed transformers and peft know: fields, optimizers, schedulers.

The heavy imports are done only where a configuration says something to check.
"""

import copy
import dataclasses
import typing
import warnings
from collections.abc import Mapping
from typing import Any

from pipeline.config.problems import nearest
from pipeline.config.quantization import quantization_problems
from pipeline.config.schema import PeftConfig, RunConfig
from pipeline.config.strict_yaml import KeyPath, dotted
from pipeline.config.training import TrainConfig

Problem = tuple[KeyPath, str]

OURS = {
    "output_dir": "the run folder is `output_dir`/`name`, both at the top level",
    "run_name": "it is `name`, at the top level",
    "project": "it is `wandb.project`",
    "seed": "it is `seed`, at the top level",
    "data_seed": "the order of rows follows from `seed`",
    "full_determinism": "masks and order are functions of `seed` already",
    "report_to": "Masklock tracks by itself; see the `wandb` section",
    "logging_strategy": "logging goes by `train.logging_steps`",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "eval_strategy": "evaluation goes by `train.eval_steps`",
    "save_strategy": "checkpoints go by `train.save_steps`",
    "save_only_model": "a checkpoint holds all that a resume needs",
    "enable_jit_checkpoint": "a signal saves a checkpoint already",
    "resume_from_checkpoint": "the newest whole checkpoint of the run folder is found by itself",
    "restore_callback_states_from_checkpoint": "a resume restores them by itself",
    "ignore_data_skip": "a resume goes on where the stream stopped",
    "gradient_accumulation_steps": "it follows from `train.global_batch_size`",
    "auto_find_batch_size": "it would change the batch; set `train.per_device_train_batch_size`",
    "remove_unused_columns": "the sample ids travel in a column of their own",
    "length_column_name": "lengths are those of the prepared samples",
    "dataloader_drop_last": "every global batch is whole",
    "accelerator_config": "each process is handed its part of the stream",
    "average_tokens_across_devices": "losses are divided by the items of the global batch",
    "label_names": "labels come from `data.label_column_name`",
    "include_for_metrics": "evaluation keeps sums, not rows",
    "batch_eval_metrics": "evaluation keeps sums, not rows",
    "prediction_loss_only": "evaluation keeps sums, not rows",
    "eval_do_concat_batches": "evaluation keeps sums, not rows",
    "activation_checkpointing": "it is `train.gradient_checkpointing`",
    "do_train": "the command says what is done",
    "do_eval": "the command says what is done",
    "do_predict": "the command says what is done",
    "local_rank": "the launcher sets it",
    "push_to_hub": "upload the `model` folder of the run yourself",
}
OURS_IN_PEFT = {
    "task_type": "it follows from `model.task`",
    "inference_mode": "training needs it off",
    "base_model_name_or_path": "it is `model.model_name_or_path`",
    "revision": "it is `model.model_revision`",
    "auto_mapping": "it is written when the adapter is saved",
    "peft_version": "it is written when the adapter is saved",
}


def installed_problems(config: RunConfig) -> list[str]:
    """Every problem of a configuration that the installed libraries can tell, one sentence each."""
    return [f"{dotted(place)}: {said}" for place, said in problems_in(config.model_dump())]


def problems_in(data: Mapping[str, Any]) -> list[Problem]:
    """The same for plain data, which may have other problems too, with the place apart."""
    train, peft, model = data.get("train"), data.get("peft"), data.get("model")
    problems = _train_problems(train) if isinstance(train, Mapping) else []
    quantization = model.get("quantization_config") if isinstance(model, Mapping) else None
    if isinstance(quantization, Mapping):
        problems += quantization_problems(quantization)
    return problems + (_peft_problems(peft) if isinstance(peft, Mapping) else [])


def _train_problems(train: Mapping[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    for key in ("lr_scheduler_type", "optim"):
        value = train.get(key)
        if isinstance(value, str) and value != TrainConfig.model_fields[key].default:
            problems += _choice_problem(key, value)
    extra = train.get("extra")
    if isinstance(extra, Mapping) and extra:
        problems += _extra_problems(extra)
    unknown = [key for key in train if key not in TrainConfig.model_fields]
    return problems + (_misplaced(unknown) if unknown else [])


def _choice_problem(key: str, value: str) -> list[Problem]:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    kind: Any = SchedulerType if key == "lr_scheduler_type" else OptimizerNames
    known = [str(member.value) for member in kind]
    if value in known:
        return []
    hint = nearest(value, known) or f"; known: {', '.join(known)}"
    return [(("train", key), f"the installed transformers has no {value!r}{hint}")]


def _extra_problems(extra: Mapping[str, Any]) -> list[Problem]:
    fields = _training_arguments()
    problems: list[Problem] = []
    for key, value in extra.items():
        place: KeyPath = ("train", "extra", key)
        if key in TrainConfig.model_fields:
            problems.append((place, f"is a field of its own; set train.{key}"))
        elif key in OURS:
            problems.append((place, f"cannot be set here: {OURS[key]}"))
        elif key not in fields:
            hint = nearest(key, [*fields, *TrainConfig.model_fields]) or "; see its documentation"
            problems.append((place, f"the installed TrainingArguments has no such field{hint}"))
        else:
            problems += _value_problem(place, fields[key], value)
    return problems


def _misplaced(keys: list[str]) -> list[Problem]:
    """Unknown keys of `train` that the Trainer knows: say where they go."""
    fields = _training_arguments()
    problems: list[Problem] = []
    for key in keys:
        if key in OURS:
            problems.append((("train", key), f"cannot be set: {OURS[key]}"))
        elif key in fields:
            said = f"is a field of TrainingArguments; it goes into train.extra.{key}"
            problems.append((("train", key), said))
    return problems


def _training_arguments() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments)}


def _peft_problems(given: Mapping[str, Any]) -> list[Problem]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    classes = {str(kind.value): found for kind, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = given.get("peft_type", PeftConfig.model_fields["peft_type"].default)
    if kind not in classes:
        hint = nearest(str(kind), classes) or f"; known: {', '.join(sorted(classes))}"
        return [(("peft", "peft_type"), f"the installed peft has no {kind!r}{hint}")]
    values = {key: value for key, value in given.items() if key != "peft_type"}
    problems = _peft_field_problems(classes[kind], values)
    return problems or _construction_problem(classes[kind], values)


def _peft_field_problems(peft_class: Any, values: Mapping[str, Any]) -> list[Problem]:
    hints = _hints(peft_class)
    names = [field.name for field in dataclasses.fields(peft_class) if field.init]
    problems: list[Problem] = []
    for key, value in values.items():
        place: KeyPath = ("peft", key)
        if key in OURS_IN_PEFT:
            problems.append((place, f"cannot be set here: {OURS_IN_PEFT[key]}"))
        elif key not in names:
            hint = nearest(key, names) or f"; it has: {', '.join(sorted(names))}"
            problems.append((place, f"{peft_class.__name__} has no such field{hint}"))
        elif key in hints:
            problems += _value_problem(place, hints[key], value)
    return problems


def _construction_problem(peft_class: Any, values: Mapping[str, Any]) -> list[Problem]:
    """Pairs that the peft class checks itself when it is made."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_class(**copy.deepcopy(dict(values)))  # some classes change the lists they get
    except (TypeError, ValueError, ImportError) as error:
        return [(("peft",), f"{peft_class.__name__} refuses these values: {error}")]
    return []


def _hints(peft_class: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(peft_class)
    except NameError:  # a class that names types it imports for type checkers only
        return {}


def _value_problem(place: KeyPath, annotation: Any, value: Any) -> list[Problem]:
    """Whether a value fits an annotation of the library's; nothing where pydantic cannot tell."""
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    try:
        TypeAdapter(annotation).validate_python(value)
    except (PydanticUserError, PydanticSchemaGenerationError):
        return []
    except ValidationError as error:
        said = dict.fromkeys(item["msg"].removeprefix("Input ") for item in error.errors())
        return [(place, f"{' or '.join(said)}, found {value!r}")]
    return []
