"""YAML without its traps: `1e-4` is a number, `yes` is a word, a key stands once, no code runs.

Scalars follow YAML 1.2 (core schema) on top of PyYAML's safe parts; every value remembers its line.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

MAX_NODES = 100_000
_PREFIX = "tag:yaml.org,2002:"


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe scanner and parser with YAML 1.2's rules for what a plain scalar is."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


StrictLoader.add_implicit_resolver(
    f"{_PREFIX}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
StrictLoader.add_implicit_resolver(
    f"{_PREFIX}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
StrictLoader.add_implicit_resolver(
    f"{_PREFIX}int", re.compile(r"^(?:[-+]?[0-9]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
StrictLoader.add_implicit_resolver(
    f"{_PREFIX}float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


class StrictDumper(yaml.SafeDumper):
    """Writes what `StrictLoader` reads back equal, and YAML 1.1 readers too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote words that YAML 1.2 takes for numbers; the dumper quotes those of YAML 1.1 itself."""
    node = dumper.represent_str(text)
    loader = StrictLoader("")
    if loader.resolve(yaml.ScalarNode, text, (True, False)) != f"{_PREFIX}str":
        node.style = "'"
    elif any(mark in text for mark in "\n\r\x85\u2028\u2029"):
        node.style = '"'  # the other styles fold line breaks that are not plain ones
    return node


StrictDumper.add_representer(str, _represent_str)


@dataclass
class Document:
    """Plain values of a YAML text, the line of each path, and what is wrong with it."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _integer(text: str) -> int:
    return int(text, 16) if text.startswith("0x") else int(text)


def _finite(text: str) -> float:
    number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise ValueError(text)
    return number


_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": _integer,
    "float": _finite,
}


def parse_yaml(text: str) -> Document:
    """Read one YAML document; syntax errors and traps come back as problems, not as exceptions."""
    document = Document()
    try:
        node = yaml.compose(text, Loader=StrictLoader)
        if node is not None:
            document.value = _Reader(document).read(node, ())
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error))
    except yaml.YAMLError as error:
        document.problems.append(f"not readable as YAML: {' '.join(str(error).split())}")
    except RecursionError:
        document.problems.append("nested too deeply, or an alias contains itself")
    return document


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=10_000)


class _Reader:
    """Turns composed nodes into plain values and fills the document's lines and problems."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.num_nodes = 0

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values (aliases counted each time)")
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_PREFIX}map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_PREFIX}seq":
            return [self.read(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        return self._refuse_tag(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(path, f"a key is a list or a mapping; keys are words (line {line})")
                continue
            key = key_node.value
            if key in values:
                first = self.document.lines[(*path, key)]
                self._problem(
                    (*path, key), f"given twice, on lines {first} and {line}; remove one of them"
                )
                continue
            if key == "<<" and key_node.style is None:
                self._problem(path, f"merge keys (<<) are not read; write them out (line {line})")
                continue
            self.document.lines[(*path, key)] = line
            values[key] = self.read(value_node, (*path, key))
        return values

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind = node.tag.removeprefix(_PREFIX)
        if kind not in _SCALARS:
            return self._refuse_tag(node, path)
        try:
            return _SCALARS[kind](node.value)
        except (ValueError, KeyError):
            line = node.start_mark.line + 1
            self._problem(path, f"{node.value[:40]} cannot be used as {kind} (line {line})")
            return None

    def _refuse_tag(self, node: yaml.Node, path: KeyPath) -> None:
        tag = node.tag.replace(_PREFIX, "!!")
        line = node.start_mark.line + 1
        self._problem(path, f"the tag {tag} is not read; write a plain value (line {line})")

    def _problem(self, path: KeyPath, sentence: str) -> None:
        self.document.problems.append(f"{dotted(path)}: {sentence}")


def dotted(path: KeyPath) -> str:
    """`("data", "ood", "far")` -> `data.ood.far`; a key that itself holds dots is quoted."""
    parts = [f'"{part}"' if "." in str(part) else str(part) for part in path]
    return ".".join(parts) or "top level"


def _syntax_problem(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    text = " ".join(filter(None, (error.context, error.problem)))
    hint = "; indent with spaces, not tabs" if "\\t" in text else ""
    return f"{place}not YAML: {text}{hint}"
