"""The command line: each command reads its arguments, starts its stage and stops. Nothing else.

Stages are imported inside their command, so that `masklock --help` answers at once.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import InputError, LayoutError, MasklockError
from pipeline.library_output import without_data_bars, without_waiting_lines

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig
    from pipeline.records import RunFolder

app = typer.Typer(
    name="masklock",
    help="Fine-tune with dropout masks locked to the sample; measure how far to trust the model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a run folder.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values on top of it: train.max_steps=80"),
]


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Find every error in configuration, data and plan before weights load."""
    from pipeline.check import check as stage

    _say(*stage(_load(config, overrides)))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every dropout site: role, variant, rate, and whether it is in force."""
    with _stdout_for_data():
        from pipeline.check import plan as stage

        planned = stage(_load(config, overrides))
    _say(_json(planned.to_json()) if as_json else planned.table())


@app.command()
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
        loaded = _load(config, overrides)
        from pipeline.train import train as stage

        raise typer.Exit(stage(loaded, _say, allow_batch_change=allow_batch_change))


@app.command()
def evaluate(run: Run, overrides: Overrides = None) -> None:
    """Deterministic and Monte-Carlo passes, calibration, out-of-distribution scores."""
    from pipeline.failure import failing_together

    with failing_together(functools.partial(typer.echo, err=True)):
        loaded = _load(run, overrides)
        folder = _folder(run, loaded)
        from monitoring.figures import save_figures
        from pipeline.evaluation.stage import evaluate as stage
        from pipeline.parallel import read_launch

        result = stage(folder, loaded, _say, save_figures)
        if read_launch().is_main:
            _say(*result["verdict"], str(folder.report_json))


@app.command()
def report(run: Run) -> None:
    """Write report.html: one file that opens offline."""
    folder = _folder(run, _load(run))
    from monitoring.report import write_report

    _say(str(write_report(folder)))


@app.command()
def mask(
    source: Annotated[str, typer.Argument(metavar="CASES.json|RUN", help="Cases, or a run.")],
    site: Annotated[str | None, typer.Option(help="Site, as `masklock plan` names it.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="Sample id.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Optimizer step of training.")] = None,
    mc_pass: Annotated[
        int | None, typer.Option("--pass", min=0, help="Monte-Carlo pass of the evaluation.")
    ] = None,
) -> None:
    """Print the masks of named coordinates as JSON."""
    with _stdout_for_data():
        if Path(source).suffix.lower() == ".json" and not Path(source).is_dir():
            if (site, sample, step, mc_pass) != (None, None, None, None):
                raise InputError("Cases carry their own coordinates: leave the options out.")
            result = _masks_of_cases(Path(source))
        else:
            result = _mask_of_run(source, site, sample, step, mc_pass)
    _say(_json(result))


@app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
) -> None:
    """Write the weights in Hugging Face format, with an adapter merged into its base model."""
    folder = _folder(run, _load(run))
    from pipeline.export import export as stage

    _say(str(stage(folder, output)))


@app.command("verify-sync")
def verify_sync(
    config: Config,
    overrides: Overrides = None,
    layouts: Annotated[
        str | None, typer.Option(help="Such as ddp:2,accumulate:4,resume:1-2; default: what fits.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the same steps as several layouts; compare masks, gradients, weights (exit 1: differ)."""
    loaded = _load(config, overrides)
    from pipeline.verify.layouts import parse_layouts
    from pipeline.verify.stage import verify_sync as stage

    chosen = None if layouts is None else parse_layouts(layouts)
    if as_json:
        with _stdout_for_data():
            outcomes = stage(loaded, chosen, functools.partial(typer.echo, err=True))
    else:
        outcomes = stage(loaded, chosen, _say)
    if as_json:
        _say(_json({"layouts": [outcome.to_json() for outcome in outcomes]}))
    raise typer.Exit(0 if all(outcome.equal for outcome in outcomes) else 1)


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from pipeline.config.schema import RunConfig

    _say(_json(RunConfig.model_json_schema()))


@app.command()
def doctor() -> None:
    """Versions, kernel, devices: one line each with what to do (exit 1: something is broken)."""
    from pipeline.doctor import broken, examine

    with _stdout_for_data():
        findings = examine()
    _say(*(str(finding) for finding in findings))
    raise typer.Exit(1 if broken(findings) else 0)


@app.command()
def quickstart(
    modality: Annotated[str, typer.Option(help="Which modality to show.")] = "language",
) -> None:
    """The whole flow on real data found on any machine: offline, CPU, a few minutes."""
    from monitoring.figures import save_figures
    from monitoring.report import write_report
    from pipeline.quickstart import quickstart as stage

    _say(f"The report is {stage(modality, save_figures, write_report, _say)}")


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
    for package in ("pipeline", "monitoring"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        if not logger.handlers:
            logger.addHandler(_Stderr())


def _from_launcher(word: str) -> bool:
    """deepspeed hands every process its rank as an argument, besides the environment."""
    return word.startswith(("--local_rank=", "--local-rank="))


def _refuse_foreign_packages() -> None:
    """`monitoring` is a common name: another package of that name could stand in its place."""
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.find_spec("monitoring")
    found = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
    if found != root:
        raise LayoutError(
            f"The package monitoring was to come from {root}, but Python finds it in {found}. "
            f"Install Masklock with `pip install -e {root}`, or rename the other package."
        )


def _load(source: str, overrides: list[str] | None = None) -> "RunConfig":
    from pipeline.config.load import load_config

    return load_config(source, overrides or ())


def _folder(source: str, config: "RunConfig") -> "RunFolder":
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
    source: str, site: str | None, sample: int | None, step: int | None, mc_pass: int | None
) -> dict[str, Any]:
    if site is None or sample is None or (step is None) == (mc_pass is None):
        raise InputError(
            "The mask of a run needs --site NAME, --sample ID, and one of --step and --pass. "
            "`masklock plan` lists the sites."
        )
    config = _load(source)
    folder = _folder(source, config)
    from pipeline.dropout.lookup import mask_of_run

    if mc_pass is not None:
        return mask_of_run(folder, config.seed, mc_pass, site, sample, "mc")
    return mask_of_run(folder, config.seed, step or 0, site, sample, "train")


@contextlib.contextmanager
def _stdout_for_data() -> Iterator[None]:
    """Whatever a library prints meanwhile goes to stderr: stdout is for what was asked."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _say(*lines: str) -> None:
    for line in lines:
        typer.echo(line)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    main()
