"""How pages are rendered: one strict Jinja environment, everything escaped."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from monitoring import words
from monitoring.figures import Chart

_WORDS = (
    words.percent,
    words.decimal,
    words.quantity,
    words.duration,
    words.interval,
    words.measure,
    words.title_of,
    words.needs_mc,
)


def render(template: str, content: dict[str, Any]) -> str:
    """A template of `templates/` filled in; a name that is not there is an error."""
    return _environment().get_template(template).render(content)


def shown(charts: Sequence[Chart]) -> list[tuple[str, Markup]]:
    """Titles and drawings, for the templates."""
    return [(chart.title, Markup(chart.svg)) for chart in charts]


def cell(value: Any) -> Markup:
    """A text as one cell of a Markdown table: one line, no HTML, no column of its own."""
    text = escape(" ".join(str(value).split()))
    for sign in "\\`*_{}[]|#!~":
        text = text.replace(sign, f"\\{sign}")
    return Markup(text)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (*_WORDS, cell):
        environment.filters[function.__name__] = function
    environment.globals["explain"] = words.EXPLANATIONS.get
    return environment
