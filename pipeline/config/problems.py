"""Turns what pydantic finds into sentences: place, value found, nearest known key."""

import copy
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.schema import RunConfig
from pipeline.config.strict_yaml import KeyPath, dotted

Origin = Callable[[KeyPath], str]
_STUBS: dict[str, Any] = {
    "name": "name",
    "task": "text-classification",
    "path": "path",
    "model": {"task": "text-classification", "model_name_or_path": "name"},
    "data": {"path": "path"},
}


def config_problems(data: dict[str, Any], origin: Origin) -> tuple[RunConfig | None, list[str]]:
    """The configuration, or every problem of it. `origin(path)` says where a value was written."""
    try:
        return RunConfig.model_validate(data, strict=True), []
    except ValidationError as error:
        rounded = _round_integers(data, error)
        if rounded is not None:
            return config_problems(rounded, origin)
        problems = _sentences(data, error, origin)
        return None, problems + _pairs_behind(data, error, origin, problems)


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing when no known word is near."""
    words = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.6)
    return f"; did you mean {words[close[0]]}?" if close else ""


def annotation_at(path: KeyPath) -> Any:
    """The annotation of the field at a path: `Any` in open dicts, None where no field can be."""
    annotation: Any = RunConfig
    for part in path:
        annotation = _step(annotation, part)
        if annotation is None:
            return None
    return annotation


def known_keys(path: KeyPath) -> list[str]:
    """Keys that may stand at a path; empty where keys are the user's own."""
    model = _model_of(annotation_at(path))
    return list(model.model_fields) if model else []


def holds_plain_dict(path: KeyPath) -> bool:
    """Whether a path is a dict of the user's own keys (which may hold dots) and single values."""
    inner = _dict_value(annotation_at(path))
    is_plain = inner is not None and inner is not Any and _model_of(inner) is None
    return is_plain and _dict_value(inner) is None


def takes_any_key(path: KeyPath) -> bool:
    """Whether the keys at a path are the user's own."""
    annotation = annotation_at(path)
    return annotation is Any or _dict_value(annotation) is not None


def places_of(key: str) -> list[str]:
    """Dotted places at which a key of this name is known."""
    found = [key] if key in RunConfig.model_fields else []
    return found + [
        f"{section}.{key}" for section in RunConfig.model_fields if key in known_keys((section,))
    ]


def unknown_key(path: KeyPath) -> str:
    """What to say about a key that is not known where it stands."""
    key = str(path[-1])
    known = known_keys(path[:-1])
    hint = nearest(key, known)
    elsewhere = [place for place in places_of(key) if place != dotted(path)]
    if elsewhere:
        hint = f"; did you mean {elsewhere[0]}?"
    if not hint:
        few = "; keys known here: " + ", ".join(known)
        hint = few if len(known) <= 12 else "; `masklock schema` lists the known keys"
    return f"unknown key{hint}"


def _step(annotation: Any, part: str | int) -> Any:
    if annotation is Any:
        return Any
    model = _model_of(annotation)
    if model is not None:
        known = model.model_fields.get(str(part))
        if known is not None:
            return known.annotation
        return Any if model.model_config.get("extra") == "allow" else None
    inner = _dict_value(annotation)
    return inner if inner is not None else None


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def _dict_value(annotation: Any) -> Any:
    for member in _members(annotation):
        if typing.get_origin(member) is dict:
            return typing.get_args(member)[1]
    return None


def _sentences(data: dict[str, Any], error: ValidationError, origin: Origin) -> list[str]:
    """One sentence a place; members of a union that all refuse a value share one."""
    sentences: dict[KeyPath, list[str]] = {}
    for item in error.errors(include_url=False):
        place = _place(data, item["loc"], item["type"])
        said = sentences.setdefault(place, [])
        sentence = _sentence(place, item)
        if sentence not in said:
            said.append(sentence)
    return [
        f"{dotted(place)}: {' or '.join(said)}{origin(place)}" for place, said in sentences.items()
    ]


def _sentence(place: KeyPath, item: Any) -> str:
    kind, found = item["type"], item["input"]
    if kind == "extra_forbidden":
        return unknown_key(place)
    if kind == "missing":
        return "is required but missing"
    if kind == "value_error":
        return str(item["ctx"]["error"])
    if found is None:
        return "is empty; give it a value or remove the key"
    should = item["msg"].removeprefix("Input ").removeprefix("String ")
    if kind == "literal_error":
        options = re.findall(r"'([^']+)'", item["ctx"]["expected"])
        return f"{should}, found {found!r}{nearest(str(found), options)}"
    return f"{should}, found {_short(found)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _place(data: Any, loc: tuple[str | int, ...], kind: str) -> KeyPath:
    """The part of pydantic's location that stands in the file: it adds names of union members."""
    place: list[str | int] = []
    for part in loc:
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if not inside:
            return (*place, part) if kind == "missing" and part == loc[-1] else tuple(place)
        place.append(part)
        data = data[part]
    return tuple(place)


def _round_integers(data: dict[str, Any], error: ValidationError) -> dict[str, Any] | None:
    """`1e4` where an integer is asked for is 10000; None when nothing of that kind is wrong."""
    rounded, changed = copy.deepcopy(data), False
    for item in error.errors(include_url=False):
        value = item["input"]
        if item["type"] == "int_type" and isinstance(value, float) and value.is_integer():
            place = _place(data, item["loc"], item["type"])
            _parent(rounded, place)[place[-1]] = int(value)
            changed = True
    return rounded if changed else None


def _pairs_behind(
    data: dict[str, Any], error: ValidationError, origin: Origin, said: list[str]
) -> list[str]:
    """Problems of pairs of fields, which pydantic looks at only once single fields are right.

    The broken keys are taken out, and what then turns up counts unless it speaks of one of them.
    """
    repaired = copy.deepcopy(data)
    touched: set[str] = set()
    for item in error.errors(include_url=False):
        place = _place(data, item["loc"], item["type"])
        if not place:
            return []
        touched.update(str(part) for part in place[-1:])
        stub = _STUBS.get(str(place[-1]))
        parent = _parent(repaired, place)
        if item["type"] != "extra_forbidden" and stub is not None and isinstance(parent, dict):
            parent[place[-1]] = copy.deepcopy(stub)
        elif isinstance(parent, dict):
            parent.pop(place[-1], None)
    try:
        RunConfig.model_validate(repaired, strict=True)
    except ValidationError as second:
        found = _sentences(repaired, second, origin)
        return [one for one in found if one not in said and not touched & _words(one)]
    return []


def _words(sentence: str) -> set[str]:
    return set(re.findall(r"\w+", sentence))


def _parent(data: Any, place: KeyPath) -> Any:
    for part in place[:-1]:
        data = data[part]
    return data
