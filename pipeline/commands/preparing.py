"""Before a run: what is wrong with it, what it would mask, and what it can run on."""

from typing import Annotated

import typer

from pipeline.commands.shell import Config, Overrides, as_json_text, load, say, stdout_for_data


def check(config: Config, overrides: Overrides = None) -> None:
    """Find every error in configuration, data and plan before weights load."""
    from pipeline.check import check as stage

    say(*stage(load(config, overrides)))


def plan(
    config: Config,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every dropout site: role, variant, rate, and whether it is in force."""
    with stdout_for_data():
        from pipeline.check import plan as stage

        planned = stage(load(config, overrides))
    say(as_json_text(planned.to_json()) if as_json else planned.table())


def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from pipeline.config.schema import RunConfig

    say(as_json_text(RunConfig.model_json_schema()))


def doctor() -> None:
    """Versions, kernel, devices: one line each with what to do (exit 1: something is broken)."""
    from pipeline.doctor import broken, examine

    with stdout_for_data():
        findings = examine()
    say(*(str(finding) for finding in findings))
    raise typer.Exit(1 if broken(findings) else 0)
