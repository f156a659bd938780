"""What each channel of a multimodal model is worth, for the report; what such a model is called."""

from collections.abc import Mapping
from typing import Any

from monitoring.run import Run, is_number


def channels_of(run: Run) -> dict[str, Any]:
    """Quality with all channels, and one row for each channel that is removed."""
    section = run.section("channels")
    without = section.get("without") or {}
    if not without:
        return {"rows": []}
    rates = section.get("rates") or {}
    rows = [_row("All channels", section.get("all") or {}, None)]
    rows += [_row(f"Without {name}", part, rates.get(name)) for name, part in without.items()]
    return {"rows": rows, "verdict": _verdict(without)}


def _row(title: str, part: Mapping[str, Any], rate: Any) -> dict[str, Any]:
    change = part.get("change") or {}
    return {
        "title": title,
        "rate": rate,
        **{name: part.get(name) for name in ("accuracy", "accuracy_interval", "loss")},
        "accuracy_change": _signed(change.get("accuracy"), 100, 1),
        "loss_change": _signed(change.get("loss"), 1, 3),
    }


def _signed(change: Any, factor: float, digits: int) -> tuple[str, str]:
    """A change with its sign, and its interval; empty where there is none."""
    if not isinstance(change, dict) or not is_number(change.get("estimate")):
        return "", ""
    lower, upper = (f"{factor * end:+.{digits}f}" for end in change["interval"])
    return f"{factor * change['estimate']:+.{digits}f}", f"{lower} to {upper}"


def _verdict(without: Mapping[str, Any]) -> str:
    """Which channels the model needs, in a sentence or two."""
    said = []
    for name, part in without.items():
        change = (part.get("change") or {}).get("accuracy") or {}
        interval = change.get("interval") or []
        if len(interval) != 2 or not all(is_number(end) for end in interval):
            continue
        lower, upper = interval
        if upper < 0:
            said.append(f"without {name} it loses {-100 * change['estimate']:.1f} points")
        elif lower > 0:
            said.append(f"without {name} it is better by {100 * change['estimate']:.1f} points")
        else:
            said.append(f"without {name} nothing clearly changes")
    return f"Accuracy: {', '.join(said)}." if said else ""


def model_name(model: Mapping[str, Any]) -> str | None:
    """The model by name or architecture; of channels, the encoder of each."""
    channels = model.get("channels")
    if isinstance(channels, dict) and channels:
        found = {name: model_name(one) for name, one in channels.items() if isinstance(one, dict)}
        return ", ".join(f"{name}: {encoder}" for name, encoder in found.items())
    return model.get("model_name_or_path") or model.get("model_type")
