"""What to take home from a report, in sentences: quality, calibration, uncertainty, OOD.

Plain words, and nothing claimed that its interval does not carry.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.calibration import TEMPERATURE_BOUNDS
from pipeline.evaluation.judge import ECE_CHANGE

Report = Mapping[str, Any]
NO_DROPOUT = (
    "This model has no live dropout site: the figures called Monte-Carlo are those of one plain "
    "pass, and say nothing about what the model does not know. To have them, set a rate under "
    "`dropout:` (for models without dropout of their own, `dropout.insert`) and train again."
)


def verdict(report: Report, confidence_level: float) -> list[str]:
    """The sentences, most important first."""
    level = f"{confidence_level:.0%} interval"
    if "accuracy" in report["quality"]["mc"]:
        sentences = [
            _accuracy(report, level),
            _calibration(report, level) if report["mc"]["num_sites"] else NO_DROPOUT,
            _temperature(report),
            _errors(report),
        ]
    else:
        sentences = [_perplexity(report, level), _token_calibration(report)]
        sentences += [] if report["mc"]["num_sites"] else [NO_DROPOUT]
    return [*sentences, *(section["verdict"] for section in report["ood"].values())]


def _accuracy(report: Report, level: str) -> str:
    accuracy, chance = report["quality"]["mc"]["accuracy"], report["chance"]
    lower, upper = report["intervals"]["mc/accuracy"]
    found = (
        f"Accuracy is {accuracy:.1%} on {_count(report['num_samples']['test'], 'test row')} "
        f"({level} {lower:.1%} to {upper:.1%}), {_averaged(report)}; "
        f"always answering the most frequent class would give {chance:.1%}"
    )
    if upper < chance:
        return f"{found}, which is better."
    return f"{found}, which is not clearly worse." if lower <= chance else f"{found}."


def _calibration(report: Report, level: str) -> str:
    plain, mc = (report["calibration"][way]["ece"] for way in ("deterministic", "mc"))
    lower, upper = report["intervals"][ECE_CHANGE]
    if lower > 0:
        change = "make calibration worse"
    elif upper < 0:
        change = "make calibration better"
    else:
        change = "do not clearly change calibration"
    return (
        f"Monte-Carlo passes {change}: the calibration error (ECE, 0 is best) is {mc:.3f} with "
        f"them and {plain:.3f} in the plain pass ({level} of the difference {lower:+.3f} to "
        f"{upper:+.3f})."
    )


def _temperature(report: Report) -> str:
    temperature = report["calibration"]["temperature"]
    rows = _count(report["num_samples"]["validation"], "validation row")
    tempered = report["calibration"]["mc_temperature"]["ece"]
    found = (
        f"With the temperature {temperature:.2f}, fitted on {rows}, the calibration error of the "
        f"passes is {tempered:.3f}"
    )
    lowest, highest = TEMPERATURE_BOUNDS
    if lowest * 1.001 < temperature < highest / 1.001:
        return f"{found}."
    return (
        f"{found}; but that temperature is the end of the search, so these validation rows are too "
        "few or too alike to fit one."
    )


def _errors(report: Report) -> str:
    num_rows = report["num_samples"]["test"]
    num_right = round(report["quality"]["mc"]["accuracy"] * num_rows)
    area = report["uncertainty"]["error_auroc"]["mutual_information"]
    if area is None:
        found = "right" if num_right else "wrong"
        return (
            f"Every test prediction is {found}, so nothing can be said about whether uncertainty "
            "finds the wrong ones."
        )
    return (
        f"As a detector of wrong predictions, mutual information has an AUROC of {area:.3f} "
        f"({num_rows - num_right} wrong, {num_right} right; 0.5 is chance)."
    )


def _perplexity(report: Report, level: str) -> str:
    plain, mc = (report["quality"][way]["perplexity"] for way in ("deterministic", "mc"))
    lower, upper = report["intervals"]["mc/perplexity"]
    samples = _count(report["num_samples"]["test"], "test sample")
    return (
        f"Perplexity is {mc:.2f} on {samples} ({level} {lower:.2f} to {upper:.2f}), "
        f"{_averaged(report)}; the plain pass has {plain:.2f}."
    )


def _token_calibration(report: Report) -> str:
    plain, mc = (report["calibration"][way]["ece"] for way in ("deterministic", "mc"))
    return (
        f"The calibration error of the next token (ECE, 0 is best) is {mc:.3f} with Monte-Carlo "
        f"passes and {plain:.3f} in the plain pass."
    )


def _averaged(report: Report) -> str:
    if not report["mc"]["num_sites"]:
        return "in one pass"
    return f"averaged over {report['mc']['num_passes']} Monte-Carlo passes"


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"
