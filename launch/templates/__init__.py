"""The texts that launchers fill in: strict, so that a name they lack is an error."""

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render_template(name: str, **values: Any) -> str:
    """A template filled in.

    Filters: `quote` for a word of a shell; `program` and `argument` for those of a systemd unit.
    """
    environment = Environment(  # not HTML: shells and units have their own quoting
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["program"] = _program
    environment.filters["argument"] = _argument
    return environment.get_template(name).render(**values)


def _program(word: str) -> str:
    """The first word of an `Exec` line: specifiers are expanded there, variables are not."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _argument(word: str) -> str:
    """Any other word of an `Exec` line, with nothing expanded."""
    return _program(word).replace("$", "$$")
