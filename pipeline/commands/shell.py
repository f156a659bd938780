"""What every command shares: its arguments, the run they name, and what it prints."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig
    from pipeline.records import RunFolder

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a run folder.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values on top of it: train.max_steps=80"),
]


def load(source: str, overrides: list[str] | None = None) -> "RunConfig":
    from pipeline.config.load import load_config

    return load_config(source, overrides or ())


def folder_of(source: str, config: "RunConfig") -> "RunFolder":
    from pipeline.errors import RunFolderError
    from pipeline.records import RunFolder

    given = Path(source)
    path = given if given.is_dir() else Path(config.output_dir) / config.name
    if not path.is_dir():
        raise RunFolderError(
            f"The run {config.name!r} was to be in {path}, but there is no such folder. "
            f"Train it first: masklock train {source}"
        )
    return RunFolder(path)


@contextlib.contextmanager
def stdout_for_data() -> Iterator[None]:
    """Whatever a library prints meanwhile goes to stderr: stdout is for what was asked."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def say(*lines: str) -> None:
    for line in lines:
        typer.echo(line)


def as_json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
