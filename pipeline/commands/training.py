"""`train`, and the proof that no layout changes what it does."""

import functools
from typing import Annotated

import typer

from pipeline.commands.shell import Config, Overrides, as_json_text, load, say, stdout_for_data


def train(
    config: Config,
    overrides: Overrides = None,
    accelerate_config: Annotated[
        str | None, typer.Option(help="Start processes: cpu, ddp, fsdp2, zero1, ... or a file.")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="How many of them.")] = None,
    allow_batch_change: Annotated[
        bool, typer.Option("--allow-batch-change", help="Go on with another global batch.")
    ] = False,
) -> None:
    """Train, or go on where a stopped run left off (exit 75: stopped by a signal after saving)."""
    if accelerate_config is not None or num_processes is not None:
        from pipeline.engines import launch

        words = ["train", config, *(overrides or ())]
        words += ["--allow-batch-change"] * allow_batch_change
        raise typer.Exit(launch(accelerate_config or "ddp", num_processes, words))
    from pipeline.failure import failing_together

    with failing_together(functools.partial(typer.echo, err=True)):
        loaded = load(config, overrides)
        from pipeline.train import train as stage

        raise typer.Exit(stage(loaded, say, allow_batch_change=allow_batch_change))


def verify_sync(
    config: Config,
    overrides: Overrides = None,
    layouts: Annotated[
        str | None, typer.Option(help="Such as ddp:2,accumulate:4,resume:1-2; default: what fits.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the same steps as several layouts; compare masks, gradients, weights (exit 1: differ)."""
    loaded = load(config, overrides)
    from pipeline.verify.layouts import parse_layouts
    from pipeline.verify.stage import verify_sync as stage

    chosen = None if layouts is None else parse_layouts(layouts)
    if as_json:
        with stdout_for_data():
            outcomes = stage(loaded, chosen, functools.partial(typer.echo, err=True))
    else:
        outcomes = stage(loaded, chosen, say)
    if as_json:
        say(as_json_text({"layouts": [outcome.to_json() for outcome in outcomes]}))
    raise typer.Exit(0 if all(outcome.equal for outcome in outcomes) else 1)
