"""The rows of a configuration as files: for stages that train on a mixture of them."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import RunConfig
from pipeline.data import SPLITS, load_raw
from pipeline.errors import RunFolderError
from pipeline.modality.bundle import LabelNames, modality_of
from pipeline.modality.labels import label_numbers
from pipeline.records import flush, write_json

if TYPE_CHECKING:
    from datasets import Dataset

SCHEMA = "masklock-rows-v1"


def write_rows(config: RunConfig, output: Path) -> Path:
    """Write train, validation and test.parquet, and rows.json; the folder appears once it is whole.

    Columns are those that a training reads, under the names they have. Labels are numbers that
    carry the names of all classes, so that part of the rows still knows every class.

    Raises:
        DataError: what `check` says about the rows.
        RunFolderError: the folder holds something.
    """
    if output.exists():
        raise RunFolderError(f"{output} exists already; name a new folder to write rows to.")
    raw = load_raw(config)
    parts = {split: _slim(getattr(raw, split), raw.label_names, config) for split in SPLITS}
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for split, rows in parts.items():
        rows.to_parquet(unfinished / f"{split}.parquet")
        flush(unfinished / f"{split}.parquet")
    described = {
        "schema": SCHEMA,
        "label_names": raw.label_names,
        "num_rows": {split: len(rows) for split, rows in parts.items()},
    }
    write_json(unfinished / "rows.json", described)
    os.replace(unfinished, output)
    return output


def _slim(rows: "Dataset", names: LabelNames, config: RunConfig) -> "Dataset":
    from datasets import ClassLabel, Dataset, Features

    data = config.data
    inputs = modality_of(config).inputs(data).values()
    kept = [name for name in (*inputs, data.domain_column_name) if name]
    slim = rows.select_columns(kept)
    if names is None:
        return slim
    label = data.label_column_name
    columns = {name: slim[name][:] for name in kept} | {label: label_numbers(rows, label, names)}
    features = Features({**slim.features, label: ClassLabel(names=list(names))})
    return Dataset.from_dict(columns, features=features)
