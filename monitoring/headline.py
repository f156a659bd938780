"""What a reader sees first: the verdict in sentences, and the big numbers."""

from collections.abc import Sequence
from typing import Any

from monitoring import words
from monitoring.run import Run, is_number


def verdict(run: Run) -> list[str]:
    """The sentences of the evaluation, or how far the run has come."""
    if sentences := run.report.get("verdict"):
        return list(sentences)
    if run.report:
        return ["This run has been evaluated."]
    if run.metrics:
        return ["This run has been trained but not evaluated yet: run masklock evaluate on it."]
    return ["Nothing has been recorded for this run yet."]


def tiles(run: Run) -> list[dict[str, Any]]:
    """The big numbers: of the evaluation, or of the training while there is none."""
    evaluated = _quality_tiles(run) + _calibration_tiles(run) + _detection_tiles(run)
    return evaluated or _training_tiles(run)


def _quality_tiles(run: Run) -> list[dict[str, Any]]:
    quality = run.section("quality")
    way = "mc" if quality.get("mc") else "deterministic"
    for name in ("accuracy", "perplexity"):
        if is_number((quality.get(way) or {}).get(name)):
            break
    else:
        return []
    notes = [
        words.WAYS[way],
        words.interval(run.section("intervals").get(f"{way}/{name}"), name),
    ]
    if is_number(run.report.get("chance")) and name == "accuracy":
        notes.append(f"chance {words.percent(run.report['chance'])}")
    value = words.measure(quality[way][name], name)
    return [_tile(name.capitalize(), value, notes)]


def _calibration_tiles(run: Run) -> list[dict[str, Any]]:
    calibration = run.section("calibration")
    values = {way: (calibration.get(way) or {}).get("ece") for way in words.WAYS}
    known = {way: value for way, value in values.items() if is_number(value)}
    if not known:
        return []
    way = list(known)[-1]
    notes = [words.WAYS[way]]
    if way != "deterministic" and "deterministic" in known:
        notes.append(f"{words.decimal(known['deterministic'])} in one plain pass")
    return [_tile("Calibration error (ECE)", words.decimal(known[way]), notes)]


def _detection_tiles(run: Run) -> list[dict[str, Any]]:
    """The best AUROC of finding errors, and of noticing each of the first two OOD sets."""
    detected = []
    aurocs = run.section("uncertainty").get("error_auroc") or {}
    known = {name: value for name, value in aurocs.items() if is_number(value)}
    if known:
        best = max(known, key=lambda name: known[name])
        notes = ["AUROC", words.title_of(best)]
        detected.append(_tile("Finds its own errors", words.decimal(known[best]), notes))
    for name, entry in list(run.section("ood").items())[:2]:
        best = (entry or {}).get("best") or ""
        score = ((entry or {}).get("scores") or {}).get(best) or {}
        if is_number(score.get("auroc")):
            notes = ["AUROC", words.title_of(best)]
            detected.append(_tile(f"Notices {name}", words.decimal(score["auroc"]), notes))
    return detected


def _training_tiles(run: Run) -> list[dict[str, Any]]:
    trained = []
    for key in ("train/loss", "eval/loss", "eval/accuracy", "eval/perplexity"):
        if points := run.history(key):
            namespace, name = key.split("/")
            title = f"{'Training' if namespace == 'train' else 'Evaluation'} {name}"
            step, value = points[-1]
            trained.append(_tile(title, words.measure(value, name), [f"at step {step:,}"]))
    return trained


def _tile(title: str, value: str, notes: Sequence[str]) -> dict[str, Any]:
    return {"title": title, "value": value, "notes": [note for note in notes if note]}
