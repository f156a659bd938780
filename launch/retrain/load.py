"""Reads a retraining policy with its recipe; finds all problems at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from launch.retrain.policy import Policy
from monitoring.comparison import OOD_SCORES, QUALITY
from pipeline.config.load import load_config
from pipeline.config.problems import nearest
from pipeline.config.schema import RunConfig
from pipeline.config.strict_yaml import KeyPath, dotted, parse_yaml
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """A policy that can be followed, and the recipe it names."""

    policy: Policy
    recipe: RunConfig
    source: str
    """The policy's file."""

    @property
    def folder(self) -> Path:
        """Where the line keeps its state."""
        return Path(self.policy.work_dir) / self.policy.name


def load_plan(source: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """The policy in a YAML file, with `dotted.key=value` on top, and its recipe.

    Raises:
        ConfigError: every problem, each with its place.
    """
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            ["no such file; configs/monitoring/retrain.yaml is one to start from"], str(path)
        )
    document = parse_yaml(path.read_text(encoding="utf-8"))
    problems, data = list(document.problems), document.value
    if not isinstance(data, dict):
        raise ConfigError(problems or ["a policy is a mapping of keys"], str(path))
    for override in overrides:
        problems += _set(data, override)
    policy, found = _policy(data, document.lines)
    problems += found
    recipe = None
    if isinstance(data.get("recipe"), str):
        recipe, found = _recipe(data, path)
        problems += found
    if recipe is not None and recipe.data.is_conversation:
        problems.append(
            "recipe: rows of conversations cannot be mixed by text yet; retrain on them by hand"
        )
    if policy is not None and recipe is not None:
        problems += _unknown_metrics(policy, recipe)
    if problems or policy is None or recipe is None:
        raise ConfigError(problems, str(path))
    return Plan(policy, recipe, str(path))


def known_metrics(recipe: RunConfig) -> list[str]:
    """Metrics that a gate can ask for."""
    kind = "classes" if recipe.model.task == "text-classification" else "tokens"
    sets = [f"ood/{name}/{score}" for name in recipe.data.ood for score in OOD_SCORES[kind]]
    return [*QUALITY[kind], *sets]


def _policy(data: dict[str, Any], lines: Mapping[KeyPath, int]) -> tuple[Policy | None, list[str]]:
    try:
        return Policy.model_validate(data), []
    except ValidationError as error:
        return None, [
            f"{dotted(item['loc'])}: {_sentence(item['loc'], item)}{_line(item['loc'], lines)}"
            for item in error.errors(include_url=False)
        ]


def _sentence(place: KeyPath, item: Any) -> str:
    if item["type"] == "extra_forbidden":
        known = _keys_at(place[:-1])
        hint = nearest(str(place[-1]), known) or f"; keys known here: {', '.join(known)}"
        return f"unknown key{hint}"
    if item["type"] == "missing":
        return "is required but missing"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    return f"{item['msg'].removeprefix('Input ')}, found {item['input']!r:.80}"


def _keys_at(place: KeyPath) -> list[str]:
    model: Any = Policy
    for part in place:
        fields = getattr(model, "model_fields", {})
        model = _inner(fields[part].annotation) if part in fields else model
    return list(model.model_fields)


def _inner(annotation: Any) -> Any:
    """The model in `Model | None` or `dict[str, Model]`."""
    inside = [annotation, *getattr(annotation, "__args__", ())]
    models = (part for part in inside if isinstance(part, type) and issubclass(part, BaseModel))
    return next(models, Policy)


def _line(place: KeyPath, lines: Mapping[KeyPath, int]) -> str:
    known = [place[:length] for length in range(len(place), 0, -1) if place[:length] in lines]
    return f" (line {lines[known[0]]})" if known else ""


def _recipe(data: Mapping[str, Any], path: Path) -> tuple[RunConfig | None, list[str]]:
    given = data.get("overrides")
    overrides = [str(one) for one in given] if isinstance(given, list) else []
    try:
        return load_config(data["recipe"], overrides, check_installed=False), []
    except ConfigError as error:
        return None, [f"recipe: {error.source}: {problem}" for problem in error.problems]


def _unknown_metrics(policy: Policy, recipe: RunConfig) -> list[str]:
    known = known_metrics(recipe)
    problems = [
        f"gate.metrics.{name}: there is no such metric for this recipe"
        f"{nearest(name, known) or '; there are: ' + ', '.join(known)}"
        for name in policy.gate.metrics
        if name not in known
    ]
    if policy.gate.retention and recipe.model.task != "text-classification":
        problems.append("gate.retention: sets of rows are kept apart in text-classification only")
    return problems


def _set(data: dict[str, Any], override: str) -> list[str]:
    """Apply one `dotted.key=value`."""
    key, equals, text = override.partition("=")
    value = parse_yaml(text)
    if not equals or value.problems:
        return [f"{override!r}: an override is written key=value, such as limits.cooldown=1h"]
    *above, last = key.split(".")
    place: Any = data
    for part in above:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if place is None:
            return [f"{key}: there are no keys below {part} (command line)"]
    if not isinstance(place, dict):
        return [f"{key}: there are no keys there (command line)"]
    place[last] = value.value
    return []
