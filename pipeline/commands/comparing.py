"""`compare`: two evaluated runs on the same samples and the same masks."""

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.shell import Run, as_json_text, folder_of, load, say

if TYPE_CHECKING:
    from monitoring.comparison import Comparison


def compare(
    run_a: Run,
    run_b: Run,
    resamples: Annotated[int, typer.Option(min=100, help="Behind each interval.")] = 1000,
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of each interval.")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Paired differences of two evaluated runs, RUN_B - RUN_A, with bootstrap intervals."""
    sides = [folder_of(run, load(run)) for run in (run_a, run_b)]
    from monitoring.comparison import compare_runs, read_side

    a, b = (read_side(side) for side in sides)
    found = compare_runs(a, b, num_resamples=resamples, confidence_level=level)
    say(as_json_text(found.to_json())) if as_json else say(*_table(found))


def _table(found: "Comparison") -> list[str]:
    shown = (*found.metrics, *found.slices)
    width = max(len(one.metric) for one in shown)
    level = f"{100 * found.confidence_level:g} %"
    lines = [
        f"a  {found.run_a}",
        f"b  {found.run_b}",
        f"{found.num_rows} test rows in both; intervals of {level}, those of slices [...] together",
        "",
        f"{'':{width}}       a        b    b - a   interval            rows",
    ]
    lines += [
        f"{one.metric:{width}} {one.a:8.4f} {one.b:8.4f} {one.estimate:+8.4f}"
        f"   {f'{one.lower:+.4f} {one.upper:+.4f}':18} {one.num_rows:5}"
        f"{'' if one.outcome == 'even' else f'  {one.outcome}'}"
        for one in shown
    ]
    lines += [f"{metric}: not compared, {reason}" for metric, reason in found.missing.items()]
    return [*lines, *found.notes]
