"""The rows of a run: loaded, checked, prepared for the model, laid out as one training stream."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset as TorchDataset

from pipeline.canaries import planted
from pipeline.config.schema import DataSource, RunConfig
from pipeline.dropout.key import derive_key
from pipeline.dropout.philox import permutation, philox_words
from pipeline.errors import DataError
from pipeline.modality import Modality
from pipeline.modality.bundle import LabelNames, modality_of
from pipeline.modality.domains import domain_problems, with_domains
from pipeline.modality.image_mixing import is_mixing
from pipeline.modality.quarantine import Quarantine, SetAside
from pipeline.sources import default_split, load_splits, num_shared, ranges_of, select

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
_FINGERPRINTED = (
    *("sample_id", "input_ids", "label_mask", "labels", "domain"),
    *("image", "audio"),
)


@dataclass(frozen=True)
class RawData:
    """Rows as they were found, with the user's own columns, checked."""

    train: "Dataset"
    validation: "Dataset"
    test: "Dataset"
    ood: dict[str, "Dataset"]
    label_names: LabelNames
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreparedData:
    """Rows as the model takes them: inputs, `sample_id`, `text`, and `labels` for classification.

    `sample_id` is the row's number in its whole split. Splits number their rows separately: masks
    of training and of Monte-Carlo passes are drawn for different purposes, and that row 5 of two
    splits shares its Monte-Carlo masks says nothing about either.
    """

    train: "Dataset"
    validation: "Dataset"
    test: "Dataset"
    ood: dict[str, "Dataset"]
    label_names: LabelNames
    fingerprint: str
    """sha256 over ids, inputs and labels of all splits: equal wherever the same rows are seen."""
    notes: tuple[str, ...] = ()
    set_aside: tuple[SetAside, ...] = ()
    """Broken samples, which no split holds."""


def load_raw(config: RunConfig) -> RawData:
    """Loads every split and OOD set; one DataError lists all that is wrong with them."""
    problems: list[str] = []
    rows, notes = _main_splits(config, problems)
    ood = _ood_sets(config, problems)
    modality = modality_of(config)
    names = _label_names(modality, rows, config)
    if names is not None and len(names) < 2:
        found = ", ".join(names) or "none"
        problems.append(f"train split: a classification needs two classes, found {found}")
    for split, part in rows.items():
        needs_labels = modality.needs_labels
        problems += _problems(modality, part, config.data, names, needs_labels, f"{split} split")
    for name, part in ood.items():
        problems += _problems(
            modality, part, config.data.ood[name], None, False, f"data.ood.{name}"
        )
    if config.data.packing and config.model.task != "text-generation":
        problems.append(f"data.packing: packs documents of text-generation, not {modality.task}")
    if config.evaluation.generation is not None and modality.prompt is None:
        problems.append(
            f"evaluation.generation: models of {modality.task} say nothing; leave it out"
        )
    keeps_rows = modality.one_sample_a_row and not config.data.packing
    problems += domain_problems(rows, config, keeps_rows)
    if modality.one_sample_a_row and "train" in rows:
        num_samples = min(len(rows["train"]), config.data.max_train_samples or len(rows["train"]))
        problems += _too_few(num_samples, config.train.global_batch_size)
    _raise_if_any(problems)
    return RawData(**rows, ood=ood, label_names=names, notes=tuple(notes))


def prepare_data(config: RunConfig, raw: RawData, processor: Any) -> PreparedData:
    """Makes model inputs of every split; the limits on samples are applied here, by key."""
    modality, data = modality_of(config), config.data

    def prepare(
        rows: "Dataset", source: DataSource, names: LabelNames, limit: int | None
    ) -> "Dataset":
        found = modality.prepare(rows, source, config, processor, names, max_samples=limit)
        return with_domains(found, rows, config)

    names, limit = raw.label_names, data.max_eval_samples
    quarantine = Quarantine(data.quarantine_budget)
    parts = {
        "train": prepare(raw.train, data, names, data.max_train_samples),
        "validation": prepare(raw.validation, data, names, limit),
        "test": prepare(raw.test, data, names, limit),
    }
    ood = {name: prepare(rows, data.ood[name], None, limit) for name, rows in raw.ood.items()}
    parts = {name: _usable(quarantine, name, part, config) for name, part in parts.items()}
    parts["train"] = planted(parts["train"], config, processor)
    ood = {n: _usable(quarantine, f"ood.{n}", part, config) for n, part in ood.items()}
    every = parts | {f"ood.{name}": part for name, part in ood.items()}
    empty = [f"{name}: there is not one sample" for name, part in every.items() if not len(part)]
    _raise_if_any(empty + _too_few(len(parts["train"]), config.train.global_batch_size))
    return PreparedData(
        **parts,
        ood=ood,
        label_names=names,
        fingerprint=fingerprint_of(every),
        notes=(*raw.notes, *modality.notes(processor), *quarantine.notes()),
        set_aside=tuple(quarantine.set_aside),
    )


def _usable(quarantine: Quarantine, name: str, rows: "Dataset", config: RunConfig) -> "Dataset":
    """Rows that the modality can use, all of them looked at once."""
    judge = modality_of(config).judge
    if judge is None:
        return rows
    places = quarantine.usable(name, rows, lambda sample: judge(sample, config))
    return rows if len(places) == len(rows) else rows.select(places)


def fingerprint_of(parts: Mapping[str, "Dataset"]) -> str:
    """sha256 over ids, inputs and labels of named parts; independent of storage and chunking."""
    whole = hashlib.sha256()
    for name, rows in parts.items():
        whole.update(f"{name}\0{len(rows)}\0".encode())
        dotted = [name for name in rows.column_names if "." in name]  # parts of channels
        for column in (*_FINGERPRINTED, *(n for n in dotted if not n.endswith(".text"))):
            if column in rows.column_names:
                whole.update(column.encode() + _digest(rows, column))
    return whole.hexdigest()


class TrainingStream(TorchDataset[dict[str, Any]]):
    """Training as one sequence of num_steps x G rows; item k belongs to step k // G.

    Epoch e visits the rows in the order permutation(seed, e); the n mod G rows at its end are left
    out, others each time. An item is a function of k alone: no sampler, no cursor, so processes
    and resumes agree by themselves.

    Args:
        rows: prepared samples.
        seed: of the run.
        num_steps: optimizer steps.
        global_batch_size: G.
        with_partners: give each row another of its global batch, as `partner`.
        lengths: of the rows; with them, the rows of a global batch come shortest first, so that
            those of like length share micro-batches. Which rows a step takes stays the same.
    """

    def __init__(
        self,
        rows: "Dataset",
        seed: int,
        num_steps: int,
        global_batch_size: int,
        with_partners: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> None:
        _raise_if_any(_too_few(len(rows), global_batch_size))
        self.rows = rows.remove_columns([name for name in ("text",) if name in rows.column_names])
        self.seed, self.num_steps, self.global_batch_size = seed, num_steps, global_batch_size
        self.with_partners = with_partners
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.rows_per_epoch = len(rows) // global_batch_size * global_batch_size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._step, self._partners = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_steps * self.global_batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a stream of {len(self)}")
        epoch, place = divmod(index, self.rows_per_epoch)
        order, step = self._order_of(epoch), index // self.global_batch_size
        row = {**self.rows[int(order[place])], "mask_step": step}
        if self.with_partners:
            first = place - place % self.global_batch_size
            partner = first + self._partner_of(step, place - first)
            row["partner"] = self.rows[int(order[partner])]
        return row

    def _partner_of(self, step: int, place: int) -> int:
        """Another place of the global batch: a keyed permutation of it, each place's partner."""
        if step != self._step:
            key = derive_key(self.seed, "augment", step, "permutation", "partner", 0)
            words = philox_words(key, 0, 0, np.arange(self.global_batch_size))
            self._step, self._partners = step, np.argsort(words[:, 0], kind="stable")
        return int(self._partners[place])

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, len(self.rows))
            if self.lengths is not None:
                batches = self._order[: self.rows_per_epoch].reshape(-1, self.global_batch_size)
                by_length = np.argsort(self.lengths[batches], axis=1, kind="stable")
                self._order = np.take_along_axis(batches, by_length, axis=1).ravel()
        return self._order


def training_stream(config: RunConfig, rows: "Dataset", num_steps: int) -> TrainingStream:
    """The stream of a run: partners for mixing, and like lengths together, where it asks so."""
    by_length = config.train.train_sampling_strategy == "group_by_length"
    return TrainingStream(
        rows,
        config.seed,
        num_steps,
        config.train.global_batch_size,
        with_partners=is_mixing(config.data.augmentation.image),
        lengths=modality_of(config).lengths(rows) if by_length else None,
    )


def _main_splits(config: RunConfig, problems: list[str]) -> tuple[dict[str, "Dataset"], list[str]]:
    """The three splits; those that cannot be had are left out and said in `problems`."""
    if config.data.split is not None:
        problems.append(
            "data.split: has no effect here; use train_split, validation_split, test_split"
        )
    try:
        splits = load_splits(config.data)
    except DataError as error:
        problems.append(f"data.path: {error}")
        return {}, []
    ranges = {}
    for split in SPLITS:
        key = f"{split}_split"
        try:
            ranges[split] = ranges_of(splits, getattr(config.data, key), f"data.{key}")
        except DataError as error:
            problems.append(str(error))
    return {split: select(splits, parts) for split, parts in ranges.items()}, _overlaps(ranges)


def _overlaps(ranges: Mapping[str, Any]) -> list[str]:
    """A slice that evaluates on training rows is allowed, and said."""
    shared = {
        split: num_shared(ranges["train"], parts)
        for split, parts in ranges.items()
        if split != "train" and "train" in ranges
    }
    return [
        f"{count} rows of the {split} split are training rows: it says nothing about new data"
        for split, count in shared.items()
        if count
    ]


def _ood_sets(config: RunConfig, problems: list[str]) -> dict[str, "Dataset"]:
    sets = {}
    for name, source in config.data.ood.items():
        place = f"data.ood.{name}"
        try:
            sets[name] = _one_split(source, place)
        except DataError as error:
            message = str(error)
            problems.append(message if message.startswith(place) else f"{place}: {message}")
    return sets


def _one_split(source: DataSource, place: str) -> "Dataset":
    splits = load_splits(source)
    expression = source.split or default_split(splits, f"{place}.split")
    return select(splits, ranges_of(splits, expression, f"{place}.split"))


def _label_names(
    modality: Modality, rows: Mapping[str, "Dataset"], config: RunConfig
) -> LabelNames:
    if "train" not in rows or config.data.label_column_name not in rows["train"].column_names:
        return None
    return modality.label_names(rows["train"], config.data)


def _problems(
    modality: Modality,
    rows: "Dataset",
    source: DataSource,
    names: LabelNames,
    needs_labels: bool,
    place: str,
) -> list[str]:
    """What is wrong with the columns, and if the text is there with what they hold."""
    if not len(rows):
        return [f"{place}: there are no rows"]
    needed = modality.inputs(source)
    if needs_labels:
        needed["label_column_name"] = source.label_column_name
    missing = {key: column for key, column in needed.items() if column not in rows.column_names}
    existing = ", ".join(rows.column_names)
    problems = [
        f"there is no column {column!r}; there are: {existing}. Name the right one with {key}"
        for key, column in missing.items()
    ]
    if not missing.keys() & needed.keys() - {"label_column_name"}:
        judged = None if "label_column_name" in missing else names
        problems += modality.problems(rows, source, judged)
    return [f"{place}: {problem}" for problem in problems]


def require_enough(rows: "Dataset", global_batch_size: int) -> None:
    """Refuse fewer rows than one global batch takes."""
    _raise_if_any(_too_few(len(rows), global_batch_size))


def _too_few(num_samples: int, global_batch_size: int) -> list[str]:
    if num_samples >= global_batch_size:
        return []
    return [
        f"train.global_batch_size: one global batch takes {global_batch_size} samples, but there "
        f"are only {num_samples} to train on; use a smaller batch or more data"
    ]


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise DataError(f"data: {count}\n{lines}")


def _digest(rows: "Dataset", column: str) -> bytes:
    """Lengths and values apart, as little-endian int64: chunks and integer widths do not matter."""
    values, lengths = hashlib.sha256(), hashlib.sha256()
    arrow = rows.select_columns([column]).with_format("arrow")
    for batch in arrow.iter(batch_size=10_000):
        array = batch[column].combine_chunks()
        if isinstance(array, pa.StructArray):  # files: their bytes, or where they are
            for row in array.to_pylist():
                file = str(row["path"]).encode() if row["bytes"] is None else row["bytes"]
                values.update(hashlib.sha256(file).digest())
            continue
        if hasattr(array, "value_lengths"):
            lengths.update(
                array.value_lengths().to_numpy(zero_copy_only=False).astype("<i8").tobytes()
            )
            array = array.flatten()
        values.update(array.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return values.digest() + lengths.digest()
