"""`mask`: the masks of named coordinates."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.commands.shell import as_json_text, folder_of, load, say, stdout_for_data
from pipeline.errors import InputError


def mask(
    source: Annotated[str, typer.Argument(metavar="CASES.json|RUN", help="Cases, or a run.")],
    site: Annotated[str | None, typer.Option(help="Site, as `masklock plan` names it.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="Sample id.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Optimizer step of training.")] = None,
    mc_pass: Annotated[
        int | None, typer.Option("--pass", min=0, help="Monte-Carlo pass of the evaluation.")
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="The sample's data domain, if domains have rates.")
    ] = None,
) -> None:
    """Print the masks of named coordinates as JSON."""
    with stdout_for_data():
        if Path(source).suffix.lower() == ".json" and not Path(source).is_dir():
            if (site, sample, step, mc_pass, domain) != (None,) * 5:
                raise InputError("Cases carry their own coordinates: leave the options out.")
            result = _masks_of_cases(Path(source))
        else:
            result = _mask_of_run(source, site, sample, step, mc_pass, domain)
    say(as_json_text(result))


def _masks_of_cases(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} was to hold cases as JSON, but it cannot be read: {error}"
        ) from None
    from pipeline.dropout.cases import fill_cases

    return fill_cases(document)


def _mask_of_run(
    source: str,
    site: str | None,
    sample: int | None,
    step: int | None,
    mc_pass: int | None,
    domain: str | None,
) -> dict[str, Any]:
    if site is None or sample is None or (step is None) == (mc_pass is None):
        raise InputError(
            "The mask of a run needs --site NAME, --sample ID, and one of --step and --pass. "
            "`masklock plan` lists the sites."
        )
    config = load(source)
    folder = folder_of(source, config)
    from pipeline.dropout.lookup import mask_of_run

    purpose, index = ("mc", mc_pass) if mc_pass is not None else ("train", step or 0)
    return mask_of_run(folder, config.seed, index, site, sample, purpose, domain)
