"""`retrain` and `registry`: the loop that keeps a champion good, and the versions it moves."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands.shell import Config, Overrides, as_json_text, load, say

if TYPE_CHECKING:
    from launch.registry import Aliases, Registry, Version

Folder = Annotated[str, typer.Option("--registry", help="Folder of the registry.")]
Name = Annotated[str, typer.Argument(metavar="VERSION", help="A version, or an alias.")]
Reason = Annotated[str, typer.Option(help="Kept in the journal.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT = "runs/registry"

registry = typer.Typer(
    name="registry",
    help="Versions of models on the file system: champion, challenger, previous.",
    no_args_is_help=True,
)


def retrain(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="A retraining policy (YAML).")],
    overrides: Overrides = None,
    once: Annotated[bool, typer.Option("--once", help="Do what there is to do, then end.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say what it would do.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Do nothing until --resume.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="End a pause.")] = False,
    trigger: Annotated[
        Literal["manual"] | None, typer.Option(help="Start one now, cooldown or not.")
    ] = None,
) -> None:
    """Trigger, train, evaluate, gate, promote or keep: for a timer (0 done, 1 failed, 75 later)."""
    if [once, explain, pause, resume].count(True) != 1:
        raise typer.BadParameter("give exactly one of --once, --explain, --pause, --resume")
    if trigger is not None and not once:
        raise typer.BadParameter("--trigger goes with --once")
    from launch.retrain.load import load_plan
    from launch.retrain.tick import interfere, reasons, tick

    plan = load_plan(policy, overrides or ())
    if once:
        raise typer.Exit(tick(plan, manual=trigger == "manual"))
    if explain:
        say(*reasons(plan))
    else:
        say(interfere(plan, pause))


def rows(
    config: Config,
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    overrides: Overrides = None,
) -> None:
    """Write the rows of a configuration as parquet files: train, validation, test."""
    loaded = load(config, overrides)
    from pipeline.rows import write_rows

    say(str(write_rows(loaded, output)))


@registry.command("list")
def list_versions(registry: Folder = DEFAULT, as_json: AsJson = False) -> None:
    """All versions, and which counts."""
    found = _open(registry)
    aliases, versions = found.aliases(), found.versions()
    if as_json:
        shown = [version.to_json() | {"is": _titles(aliases, version)} for version in versions]
        say(as_json_text({"versions": shown, "aliases": aliases.to_json()}))
        return
    for version in versions:
        titles = ", ".join(_titles(aliases, version))
        say(f"{version.name}  {version.created}  {titles:<10}  {version.origin['run']}")
    if not versions:
        say(f"{registry} holds no versions yet: masklock registry register RUN")


@registry.command()
def show(
    version: Name = "champion",
    registry: Folder = DEFAULT,
    verify: Annotated[bool, typer.Option("--verify", help="Check every sum.")] = False,
    run: Annotated[bool, typer.Option("--run", help="Only the run it came from.")] = False,
) -> None:
    """One version as JSON; its folder can be given to every command that reads a run."""
    found = _open(registry)
    one = found.get(version)
    if verify:
        found.verify(one)
    if run:
        say(one.origin["run"])
        return
    titles = {"is": _titles(found.aliases(), one), "files": dict(one.files)}
    say(as_json_text(one.to_json() | titles))


@registry.command()
def register(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run whose training has finished.")],
    registry: Folder = DEFAULT,
) -> None:
    """Keep a run as a version that nothing changes any more."""
    from pipeline.records import RunFolder

    say(_open(registry).register(RunFolder(run)).name)


@registry.command()
def promote(version: Name, registry: Folder = DEFAULT, reason: Reason = "by hand") -> None:
    """Make a version the champion, after its sums are verified."""
    found = _open(registry)
    say(_moved(found.promote(found.get(version).name, reason)))


@registry.command()
def rollback(registry: Folder = DEFAULT, reason: Reason = "by hand") -> None:
    """Return to the champion before this one."""
    say(_moved(_open(registry).rollback(reason)))


@registry.command()
def journal(registry: Folder = DEFAULT) -> None:
    """Every change of the aliases, oldest first."""
    for change in _open(registry).journal():
        before = change["before"] or "nothing"
        moved = f"{before} -> {change['champion'] or 'nothing'}"
        what = change["challenger"] if change["action"] == "challenger" else moved
        say(f"{change['at']}  {change['action']:<10}  {what}  {change['reason']}")


def _open(folder: str) -> "Registry":
    from launch.registry import Registry

    return Registry(Path(folder))


def _titles(aliases: "Aliases", version: "Version") -> list[str]:
    names = ("champion", "challenger", "previous")
    return [name for name in names if getattr(aliases, name) == version.name]


def _moved(aliases: "Aliases") -> str:
    return f"The champion is {aliases.champion}; a rollback would return to {aliases.previous}."
