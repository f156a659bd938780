"""The command line: the table of commands, and how an error of any of them is shown.

Stages are imported inside their command, so that `masklock --help` answers at once.
"""

import importlib.util
import logging
import sys
from pathlib import Path

import typer

from pipeline.commands import (
    comparing,
    dashboards,
    evaluating,
    launching,
    masks,
    monitoring,
    preparing,
    retraining,
    scoring,
    training,
)
from pipeline.errors import LayoutError, MasklockError
from pipeline.library_output import without_data_bars, without_waiting_lines

app = typer.Typer(
    name="masklock",
    help="Fine-tune with dropout masks locked to the sample; measure how far to trust the model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    preparing.check,
    preparing.plan,
    training.train,
    evaluating.evaluate,
    scoring.score,
    evaluating.report,
    dashboards.dashboard,
    evaluating.card,
    comparing.compare,
    retraining.retrain,
    retraining.rows,
    monitoring.monitor,
    monitoring.alerts,
    monitoring.replay,
    masks.mask,
    evaluating.export,
    training.verify_sync,
    preparing.schema,
    preparing.doctor,
    evaluating.quickstart,
):
    app.command(command.__name__.replace("_", "-"))(command)
app.add_typer(launching.launch)
app.add_typer(retraining.registry)


def main() -> None:
    """Run the command line; errors a user can act on are shown without a traceback."""
    _hear_own_packages()
    without_data_bars()
    without_waiting_lines()
    try:
        _refuse_foreign_packages()
        app(args=[word for word in sys.argv[1:] if not _from_launcher(word)])
    except MasklockError as error:
        typer.echo(f"masklock: {error}", err=True)
        sys.exit(error.exit_code)


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def _hear_own_packages() -> None:
    """Libraries have handlers of their own: one at the root would say all of theirs twice."""
    for package in ("pipeline", "monitoring", "launch"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        if not logger.handlers:
            logger.addHandler(_Stderr())


def _from_launcher(word: str) -> bool:
    """deepspeed hands every process its rank as an argument, besides the environment."""
    return word.startswith(("--local_rank=", "--local-rank="))


def _refuse_foreign_packages() -> None:
    """These are common names: another package of that name could stand in our own's place."""
    root = Path(__file__).resolve().parents[1]
    for package in ("monitoring", "launch"):
        spec = importlib.util.find_spec(package)
        found = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
        if found != root:
            raise LayoutError(
                f"The package {package} was to come from {root}, but Python finds it in {found}. "
                f"Install Masklock with `pip install -e {root}`, or rename the other package."
            )


if __name__ == "__main__":
    main()
