"""Documents packed whole into rows of at most max_length tokens, as if each ran alone.

A packed row is the unit of the stream: of its order, and of the global batch. Each token carries
its document's `sample_id` and its position from the document's start, so masks are those of the
document wherever it was packed.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import DropoutError, ModelError

if TYPE_CHECKING:
    from datasets import Dataset

ISOLATING = ("eager", "keyed", "sdpa")
WHOLE_SAMPLE = {"path": "one decision a sample", "noise": "noise by the sample's length"}
PROBE_LENGTH = 6
BY_TOKEN = ("input_ids", "label_mask")


# -- rows ------------------------------------------------------------------------------------------


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the documents of each row: the longest first, each where it fills best.

    The same for the same lengths, in the order of each row's first document.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room and number of each row, least room first
    for document in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = bisect_left(open_rows, (lengths[document], -1))
        if place == len(open_rows):
            rows.append([])
            room, row = capacity, len(rows) - 1
        else:
            room, row = open_rows.pop(place)
        rows[row].append(document)
        if room > lengths[document]:
            insort(open_rows, (room - lengths[document], row))
    return sorted(sorted(row) for row in rows)


def packed(documents: "Dataset", capacity: int) -> "Dataset":
    """Rows of tokens, each with its `sample_id`, `position_ids`, and `label_mask` where given."""
    from datasets import Dataset

    by_token = {name: documents[name][:] for name in BY_TOKEN if name in documents.column_names}
    tokens, names = by_token["input_ids"], documents["sample_id"][:]
    columns: dict[str, list[list[int]]] = {
        name: [] for name in (*by_token, "sample_id", "position_ids")
    }
    for row in pack([len(ids) for ids in tokens], capacity):
        for name, values in by_token.items():
            columns[name].append([value for d in row for value in values[d]])
        columns["sample_id"].append([names[d] for d in row for _ in tokens[d]])
        columns["position_ids"].append([place for d in row for place in range(len(tokens[d]))])
    return Dataset.from_dict(columns)


def documents_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents of a packed row, each as a row of its own; other rows as they are."""
    if "position_ids" not in row:
        return [row]
    starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    stops = [*starts[1:], len(row["input_ids"])]
    names = [name for name in BY_TOKEN if name in row]
    return [
        {name: row[name][start:stop] for name in names} | {"sample_id": row["sample_id"][start]}
        for start, stop in zip(starts, stops, strict=True)
    ]


# -- what cannot be packed -------------------------------------------------------------------------


def require_isolation(model: nn.Module, plan: DropoutPlan) -> None:
    """Refuse models and sites for which a packed document is not what it is alone.

    Raises:
        DropoutError: a site in force decides for a whole sample.
        ModelError: the model mixes documents, or its positions do not start anew.
    """
    for site in plan.in_force():
        kind = site.variant if site.variant in WHOLE_SAMPLE else site.door
        if kind in WHOLE_SAMPLE:
            raise DropoutError(
                f"data.packing was asked for, but site {site.site} draws {WHOLE_SAMPLE[kind]}, and "
                "a packed row holds several samples. Set its rate to 0, or data.packing=false."
            )
    if fault := _fault(model):
        config: Any = model.config
        raise ModelError(
            f"data.packing was asked for, but {config.model_type} {fault}: a packed document would "
            "not be what it is alone. Set data.packing=false."
        )


def _fault(model: nn.Module) -> str | None:
    """Why this model cannot hold documents apart, found by trying; None where it can."""
    config: Any = model.config
    if config._attn_implementation not in ISOLATING:
        known = ", ".join(ISOLATING)
        return f"runs with attn_implementation {config._attn_implementation} (known: {known})"
    ids = torch.arange(2 * PROBE_LENGTH) % (config.get_text_config().vocab_size - 1)
    first, other, second = ids[:PROBE_LENGTH], ids[:PROBE_LENGTH] + 1, ids[PROBE_LENGTH:]
    try:
        alone = _logits(model, [second])
        after_first, after_other = _logits(model, [first, second]), _logits(model, [other, second])
    except TypeError:
        return "takes no position_ids"
    if not torch.equal(after_first, after_other):
        return "lets tokens see other documents of their row"
    if not torch.allclose(after_first, alone, atol=2e-2 * float(alone.abs().max())):
        return "does not start positions anew with each document"
    return None


@torch.no_grad()
def _logits(model: nn.Module, documents: list[Tensor]) -> Tensor:
    """Logits of the last document of a packed row."""
    device, was_training = next(model.parameters()).device, model.training
    places = torch.cat([torch.arange(len(d)) for d in documents])
    row = torch.cat(documents)
    try:
        logits: Tensor = model.eval()(
            input_ids=row[None].to(device), position_ids=places[None].to(device), use_cache=False
        ).logits
    finally:
        model.train(was_training)
    return logits[0, -len(documents[-1]) :].float()
