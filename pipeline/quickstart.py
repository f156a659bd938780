"""The whole flow on data found on any machine: train, evaluate, profile, report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.load import load_config
from pipeline.errors import InputError
from pipeline.exhibits import Exhibit
from pipeline.records import RunFolder

if TYPE_CHECKING:
    import pyarrow as pa

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
QUICKSTARTS = {path.parent.name: path for path in sorted(CONFIGS.glob("*/quickstart.yaml"))}


def quickstart(
    modality: str,
    exhibits: Callable[[RunFolder], Mapping[str, Exhibit]],
    keep_profile: Callable[[RunFolder, "pa.Table"], None],
    report: Callable[[RunFolder], Path],
    say: Callable[[str], None],
) -> Path:
    """Run it; return the report.

    Args:
        modality: one of QUICKSTARTS.
        exhibits: what trackers show of an evaluated run (monitoring is above this package).
        keep_profile: writes the reference profile, from the scored rows of the test split.
        report: writes the report of a run folder.
        say: receives what the user should read.
    """
    if modality not in QUICKSTARTS:
        known = ", ".join(QUICKSTARTS)
        raise InputError(f"There is no quickstart for {modality!r} yet; there is one for: {known}.")
    config = load_config(QUICKSTARTS[modality])
    from pipeline.evaluation.stage import evaluate
    from pipeline.train import train

    code = train(config, say)
    if code != 0:
        raise SystemExit(code)
    run = RunFolder(Path(config.output_dir) / config.name)
    evaluate(run, config, say, exhibits, keep_profile)
    say(f"The reference is {run.profile}: masklock monitor {run.path} --window FILES")
    return report(run)
