"""Generated sequences in the report: measures over all prompts, and what the model doubted most."""

from typing import Any

from monitoring.run import Run, is_number

NUM_SHOWN = 20
_MEASURES = (
    *("generated_log_probability", "generated_mutual_information", "semantic_entropy"),
    *("weighted_semantic_entropy", "generated_predictive_entropy"),
)
_COLUMNS = ("generated_log_probability", "generated_mutual_information", "semantic_entropy")


def sequences(run: Run) -> dict[str, Any]:
    """What the section shows; no rows where nothing was generated."""
    section = run.section("generation")
    means, correlations = section.get("means") or {}, section.get("rank_correlation") or {}
    utility = (section.get("settings") or {}).get("utility", "")
    measures = [
        {"name": name, "mean": means[name], "correlation": correlations.get(name)}
        for name in _MEASURES
        if is_number(means.get(name))
    ]
    qualities = [
        (title, means[f"{key}_{utility}"])
        for key, title in (
            ("generated", "likeliest"),
            ("least_risk", "chosen by minimum Bayes risk"),
        )
        if is_number(means.get(f"{key}_{utility}"))
    ]
    return {**section, "measures": measures, "qualities": qualities, "utility": utility,
            **_doubted(run, f"generated_{utility}")}  # fmt: skip


def _doubted(run: Run, quality: str) -> dict[str, Any]:
    """The continuations whose tokens were the least likely."""
    order = "generated_log_probability"
    rows = [row for row in run.samples_of("test") if is_number(row.get(order))]
    rows = sorted(rows, key=lambda row: (row[order], row.get("sample_id") or 0))[:NUM_SHOWN]
    known = [name for name in (*_COLUMNS, quality) if any(is_number(row.get(name)) for row in rows)]
    return {"rows": rows, "columns": known}
