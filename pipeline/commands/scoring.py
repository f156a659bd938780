"""`score`: raw rows of production to scored rows, which `monitor` judges."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.shell import Run, folder_of, load, say


def score(
    run: Run,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]... [KEY=VALUE]...", help="More inputs; values on top."),
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", help="CSV, JSON lines or parquet of raw rows; repeat for more."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Parquet file to write.")] = Path("scored.parquet"),
) -> None:
    """Score raw rows: predictions, uncertainty and out-of-distribution scores, without labels."""
    from pipeline.failure import failing_together

    with failing_together(functools.partial(typer.echo, err=True)):
        given = words or []
        loaded = load(run, [word for word in given if "=" in word])
        files = [*(inputs or ()), *(Path(word) for word in given if "=" not in word)]
        from pipeline.evaluation.score import score as stage

        table = stage(folder_of(run, loaded), loaded, files, output, say)
        if table is not None:
            say(f"{table.num_rows} scored rows: {output}")
