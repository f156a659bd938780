"""After a training: numbers, report, weights; and the whole flow in one go."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.shell import Overrides, Run, folder_of, load, say

if TYPE_CHECKING:
    from pipeline.exhibits import Exhibit
    from pipeline.records import RunFolder


def evaluate(run: Run, overrides: Overrides = None) -> None:
    """Deterministic and Monte-Carlo passes, calibration, out-of-distribution scores."""
    from pipeline.failure import failing_together

    with failing_together(functools.partial(typer.echo, err=True)):
        loaded = load(run, overrides)
        folder = folder_of(run, loaded)
        from monitoring.profile import save_profile
        from pipeline.evaluation.stage import evaluate as stage
        from pipeline.parallel import read_launch

        result = stage(folder, loaded, say, _shown, save_profile)
        if read_launch().is_main:
            say(*result["verdict"], str(folder.report_json))


def report(run: Run) -> None:
    """Write report.html: one file that opens offline."""
    folder = folder_of(run, load(run))
    from monitoring.report import write_report

    say(str(write_report(folder)))


def card(run: Run) -> None:
    """Write model/README.md: a Hugging Face model card with what was measured."""
    folder = folder_of(run, load(run))
    from monitoring.card import write_card

    say(str(write_card(folder)))


def export(
    run: Run,
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
) -> None:
    """Write the weights in Hugging Face format, with an adapter merged into its base model."""
    folder = folder_of(run, load(run))
    from pipeline.export import export as stage

    say(str(stage(folder, output)))


def quickstart(
    modality: Annotated[
        str, typer.Option(help="language, speech, vision or multimodal.")
    ] = "language",
) -> None:
    """The whole flow on real data found on any machine: offline, CPU, a few minutes."""
    from monitoring.profile import save_profile
    from monitoring.report import write_report
    from pipeline.quickstart import quickstart as stage

    say(f"The report is {stage(modality, _shown, save_profile, write_report, say)}")


def _shown(folder: "RunFolder") -> "Mapping[str, Exhibit]":
    """What trackers get of an evaluated run, its report among it: that has to be fresh."""
    from monitoring.dashboards.evaluation import evaluation_exhibits
    from monitoring.report import write_report

    exhibits = evaluation_exhibits(folder)
    write_report(folder)
    return exhibits
