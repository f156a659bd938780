"""Reads a run's configuration from YAML and `key=value` overrides; finds all problems at once."""

import copy
import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.problems import (
    Origin,
    config_problems,
    holds_plain_dict,
    known_keys,
    takes_any_key,
)
from pipeline.config.schema import RunConfig
from pipeline.config.strict_yaml import Document, KeyPath, dotted, dump_yaml, parse_yaml
from pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FILE = "config.yaml"
PRESETS = ("accelerate", "deepspeed", "monitoring")  # folders of YAML for others than a run
EMPTY = "the file is empty; start from one of the files in configs/"


def load_config(
    source: str | Path, overrides: Sequence[str] = (), check_installed: bool = True
) -> RunConfig:
    """The configuration in a YAML file or a run folder, with `dotted.key=value` overrides on top.

    Args:
        check_installed: also check what only the installed libraries know (`train.extra`, `peft`,
            optimizer and scheduler names); imports them when the configuration has any of these.
    """
    file = _find(Path(source))
    document = parse_yaml(_read(file))
    if document.value is None:
        raise ConfigError(document.problems or [EMPTY], str(file))
    if not isinstance(document.value, dict):
        raise ConfigError([_not_a_mapping(document.value)], str(file))
    given = Overrides(document.value)
    problems = document.problems + given.apply(overrides)

    def origin(path: KeyPath) -> str:
        return _origin(path, document, given.paths)

    config, found = config_problems(given.data, origin)
    if check_installed:
        installed = _installed_problems(given.data, origin)
        found = _without_places_of(installed, found) + installed
    problems += _without_places_of(document.problems, found)
    if problems or config is None:
        raise ConfigError(problems, str(file))
    return config


def _installed_problems(data: dict[str, Any], origin: Origin) -> list[str]:
    from pipeline.config.installed import problems_in

    return [f"{dotted(place)}: {said}{origin(place)}" for place, said in problems_in(data)]


def _without_places_of(said: list[str], problems: list[str]) -> list[str]:
    """The problems of other places: one explanation a place, the better one."""
    places = {sentence.partition(": ")[0] for sentence in said}
    return [problem for problem in problems if problem.partition(": ")[0] not in places]


def dump_config(config: RunConfig) -> str:
    """The complete configuration as YAML; `load_config` reads it back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def config_hash(config: RunConfig) -> str:
    """sha256 over all values, whatever file, order or spelling they came from."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def config_diff(a: RunConfig, b: RunConfig) -> list[str]:
    """One line for each value that differs: `train.max_steps: 60 -> 80`."""
    before = dict(_leaves(a.model_dump(mode="json"), ()))
    after = dict(_leaves(b.model_dump(mode="json"), ()))
    return [
        f"{dotted(path)}: {_shown(before, path)} -> {_shown(after, path)}"
        for path in [*before, *(path for path in after if path not in before)]
        if before.get(path, _ABSENT) != after.get(path, _ABSENT)
    ]


_ABSENT = object()


def _shown(leaves: dict[KeyPath, Any], path: KeyPath) -> str:
    return json.dumps(leaves[path], ensure_ascii=False) if path in leaves else "(absent)"


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif value != {}:
        yield path, value


class Overrides:
    """Applies `dotted.key=value` to plain data, and remembers which paths they set."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = copy.deepcopy(data)
        self.paths: set[KeyPath] = set()

    def apply(self, overrides: Sequence[str]) -> list[str]:
        """Set every override; returns the problems of those that cannot be set."""
        return [problem for override in overrides for problem in self._apply_one(override)]

    def _apply_one(self, override: str) -> list[str]:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            return [f"{override!r}: an override is written key=value, such as train.max_steps=80"]
        path = split_key(key.strip().removeprefix("--"))
        document = parse_yaml(text)
        if (
            document.problems and text[:1] in "*@%`&!"
        ):  # globs and the like: YAML has other plans for them
            document = Document(value=text)
        if document.problems:
            return [f"{key}: {problem} (command line)" for problem in document.problems]
        return self._set(path, document.value)

    def _set(self, path: KeyPath, value: Any) -> list[str]:
        place: Any = self.data
        for length, part in enumerate(path[:-1], start=1):
            if not (known_keys(path[:length]) or takes_any_key(path[:length])):
                known = known_keys(path[: length - 1])
                if part in known or not known:
                    return [f"{dotted(path)}: {_has_no_keys(path[:length])} (command line)"]
            if place.get(part) is None:
                place[part] = {}
                self.paths.add(path[:length])
            place = place[part]
            if not isinstance(place, dict):
                return [f"{dotted(path)}: {_has_no_keys(path[:length])} (command line)"]
        place[path[-1]] = value
        self.paths.add(path)
        return []


def split_key(key: str) -> KeyPath:
    """`a.b.c` -> its parts; below a dict of single values (`dropout.overrides`) one key."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        if holds_plain_dict(tuple(parts[:length])):
            return (*parts[:length], ".".join(parts[length:]))
    return tuple(parts)


def _has_no_keys(path: KeyPath) -> str:
    return f"{dotted(path)} is a single value and has no keys"


def _origin(path: KeyPath, document: Document, overridden: set[KeyPath]) -> str:
    """` (line 12)` or ` (command line)` of a path, or of the nearest section around it."""
    for length in range(len(path), 0, -1):
        part = path[:length]
        if part in overridden:
            return " (command line)"
        if part in document.lines:
            return f" (line {document.lines[part]})"
    return ""


def _find(source: Path) -> Path:
    file = source / CONFIG_FILE if source.is_dir() else source
    if file.is_file():
        return file
    if source.is_dir():
        raise ConfigError([f"is no run folder: it holds no {CONFIG_FILE}"], str(source))
    if file.exists():
        raise ConfigError(["is not a regular file"], str(source))
    known: dict[str, str] = {}
    for path in _candidates(source):
        known.setdefault(path.stem, str(path))  # the nearest one of a name
    close = difflib.get_close_matches(source.stem, known, n=1)
    hint = f"; did you mean {known[close[0]]}?" if close else f"; there are: {_few(known.values())}"
    raise ConfigError([f"no such file or run folder{hint}"], str(source))


def _few(paths: Iterable[str]) -> str:
    return ", ".join(list(paths)[:8]) or "none nearby"


def _candidates(source: Path) -> Iterator[Path]:
    """Configurations and run folders near the place asked for, then those in `configs/`."""
    parent = next((parent for parent in source.parents if parent.is_dir()), Path())
    yield from sorted(path.parent for path in parent.glob(f"*/{CONFIG_FILE}"))
    for pattern in ("*.yaml", "*.yml", "*/*.yaml"):
        yield from sorted(path for path in parent.glob(pattern) if _may_be_run(path))
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        if _may_be_run(path):
            yield path.relative_to(ROOT) if Path.cwd() == ROOT else path


def _may_be_run(path: Path) -> bool:
    return path.name != CONFIG_FILE and path.parent.name not in PRESETS


def _read(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"is not UTF-8 text (byte {error.start}); a YAML file is expected"], str(file)
        ) from None
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], str(file)) from None
    if "\0" in text:
        raise ConfigError(["is a binary file; a YAML file is expected"], str(file))
    return text


def _not_a_mapping(value: Any) -> str:
    kind = "list" if isinstance(value, list) else "single value"
    return (
        f"top level: expected keys such as name, model, data; found a {kind}: {str(value)[:60]!r}"
    )
