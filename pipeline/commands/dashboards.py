"""Weights & Biases: the two workspaces of a run, printed, written or saved."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.shell import Run, as_json_text, folder_of, load, say, stdout_for_data

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig
    from pipeline.records import RunFolder


def dashboard(
    run: Run,
    output: Annotated[
        Path | None, typer.Option(help="Write the JSON files into this folder.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Save both views to W&B.")] = False,
) -> None:
    """Two W&B workspaces as JSON: Dropout and uncertainty, Production drift; or save them."""
    config = load(run)
    folder = folder_of(run, config)
    with stdout_for_data():
        specifications = _specifications(config.name)
    if output is not None:
        from pipeline.records import write_json

        for name, specification in specifications.items():
            write_json(output / f"{name}.json", specification)
            say(str(output / f"{name}.json"))
    if save:
        _save(config, folder, specifications)
    if output is None and not save:
        say(as_json_text(specifications))


def _specifications(run_name: str) -> dict[str, Any]:
    try:
        from monitoring.dashboards.workspaces import specifications
    except ModuleNotFoundError as error:
        from pipeline.errors import InputError

        raise InputError(
            f"Dashboards are built with wandb-workspaces, but Python finds no {error.name}. "
            "Install it: pip install 'masklock[dashboards]'"
        ) from None
    return specifications(run_name)


def _save(config: "RunConfig", folder: "RunFolder", specifications: dict[str, Any]) -> None:
    from monitoring.dashboards.workspaces import TITLES, view_name
    from pipeline.tracking import View, save_views

    views = [
        View(view_name(name, config.name), TITLES[name], specification)
        for name, specification in specifications.items()
    ]
    for view, url in zip(views, save_views(config.wandb, folder, views), strict=True):
        say(f"{view.title}: {url}")
