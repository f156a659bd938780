"""The functions of Python's own standard library, as a corpus.

Read from the running interpreter's library folder, source files only; nothing is imported,
downloaded or kept. Rows differ a little from one version of Python to the next.
"""

import ast
import hashlib
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# Present in every CPython >= 3.11, the slim images included, with enough functions to learn from.
PACKAGES = (
    "argparse",
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "tarfile",
    "typing",
    "unittest",
    "urllib",
    "xml",
)
# Other subjects in the same language and style: never trained on, the split `ood`.
HELD_OUT = ("_pydecimal", "calendar", "ctypes", "ipaddress", "pickle", "statistics")

MIN_LINES, MAX_LINES = 4, 60
MAX_FUNCTIONS = 300  # of one package, so that asyncio does not drown tarfile
NUM_EVALUATION_ROWS = 300  # in each of validation and test


class Function(NamedTuple):
    """One function or method: the package it comes from, and its source."""

    package: str
    text: str


def functions_of(package: str, library: Path) -> Iterator[Function]:
    """Functions and methods of a package or module, in file and line order, tests left out."""
    module = library / f"{package}.py"
    for file in [module] if module.exists() else sorted((library / package).rglob("*.py")):
        if {"test", "tests"}.isdisjoint(file.relative_to(library).parts):
            source = file.read_text(encoding="utf-8")
            lines = source.splitlines(keepends=True)
            for node in _definitions(_parse(source)):
                text = _source_of(node, lines)
                if MIN_LINES <= text.count("\n") <= MAX_LINES:
                    yield Function(package, text)


@cache  # the training splits and an OOD set are two sources, read one after the other
def collect(packages: tuple[str, ...], library: Path) -> tuple[Function, ...]:
    """At most MAX_FUNCTIONS distinct functions a package, in an order given by their text alone."""
    seen: set[str] = set()
    chosen: list[Function] = []
    for package in packages:
        found = {function.text: function for function in functions_of(package, library)}
        fresh = [found[text] for text in sorted(found, key=_hash("choose")) if text not in seen]
        seen.update(found)
        chosen += fresh[:MAX_FUNCTIONS]
    return tuple(sorted(chosen, key=lambda function: _hash("order")(function.text)))


def python_stdlib(library: Path | None = None) -> "DatasetDict":
    """Functions of the standard library: `text`, `label` (which package it is from), `package`.

    Splits: train, validation, test, and ood: packages held out, whose label is -1. No text stands
    in two rows.
    """
    from datasets import DatasetDict

    library = library or Path(sysconfig.get_path("stdlib"))
    rows = collect(PACKAGES + HELD_OUT, library)
    known = [row for row in rows if row.package in PACKAGES]
    first, second = NUM_EVALUATION_ROWS, 2 * NUM_EVALUATION_ROWS
    return DatasetDict(
        train=_dataset(known[second:]),
        validation=_dataset(known[first:second]),
        test=_dataset(known[:first]),
        ood=_dataset([row for row in rows if row.package in HELD_OUT]),
    )


def _parse(source: str) -> ast.Module:
    with (
        warnings.catch_warnings()
    ):  # old escapes in the library's strings are not the user's concern
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions at any level of classes and branches, but not those inside another function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.ClassDef | ast.If | ast.Try):
            yield from _definitions(child)


def _source_of(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip() + "\n"


def _hash(purpose: str) -> Callable[[str], bytes]:
    return lambda text: hashlib.blake2b(f"{purpose}\0{text}".encode(), digest_size=16).digest()


def _dataset(rows: Sequence[Function]) -> "Dataset":
    from datasets import ClassLabel, Dataset, Features, Value

    number = {package: index for index, package in enumerate(PACKAGES)}
    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=list(PACKAGES)),
            "package": Value("string"),
        }
    )
    columns = {
        "text": [row.text for row in rows],
        "label": [number.get(row.package, -1) for row in rows],
        "package": [row.package for row in rows],
    }
    return Dataset.from_dict(columns, features=features)
