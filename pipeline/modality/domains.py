"""Data domains of rows, as the numbers that dropout plans know them by."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import RunConfig
from pipeline.dropout.schedules import NO_DOMAIN

if TYPE_CHECKING:
    from datasets import Dataset


def with_domains(prepared: "Dataset", rows: "Dataset", config: RunConfig) -> "Dataset":
    """Adds `domain` to prepared samples: the place of the row's domain among those with rates.

    Rows of other domains, and of sets without the column, keep the rates of their roles.
    """
    column = config.data.domain_column_name
    if column is None:
        return prepared
    codes = {name: place for place, name in enumerate(sorted(config.dropout.domains))}
    names = _names(rows, column) if column in rows.column_names else []
    found = [
        codes.get(names[sample], NO_DOMAIN) if names else NO_DOMAIN
        for sample in prepared["sample_id"][:]
    ]
    return prepared.add_column("domain", found)


def domain_problems(
    splits: Mapping[str, "Dataset"], config: RunConfig, one_sample_a_row: bool
) -> list[str]:
    """What is wrong with the column of domains, and names that no training row has."""
    column = config.data.domain_column_name
    if column is None:
        return []
    if not one_sample_a_row:
        return [
            f"data.domain_column_name: {config.model.task} joins rows into blocks, which have no "
            "domain of their own; leave it and dropout.domains out"
        ]
    problems = [
        f"{split} split: there is no column {column!r} (data.domain_column_name); there are: "
        f"{', '.join(rows.column_names)}"
        for split, rows in splits.items()
        if column not in rows.column_names
    ]
    if problems or "train" not in splits:
        return problems
    known = sorted(set(_names(splits["train"], column)))
    few = ", ".join(known[:8]) + ", ..." * (len(known) > 8)
    return [
        f"dropout.domains.{name}: no training row has this domain in column {column!r}; it has: "
        f"{few}"
        for name in sorted(config.dropout.domains)
        if name not in known
    ]


def _names(rows: "Dataset", column: str) -> list[str]:
    feature: Any = rows.features[column]
    values = rows[column][:]
    if hasattr(feature, "int2str"):
        return [feature.int2str(value) if value is not None else "" for value in values]
    return [str(value) for value in values]
