"""Rows of a configuration as files: what a later training on part of them needs."""

import json

import pytest
from datasets import ClassLabel, load_dataset

from pipeline.errors import RunFolderError
from pipeline.rows import write_rows


def written(config, folder):
    write_rows(config, folder)
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation", "test")}
    return load_dataset("parquet", data_files=files), json.loads((folder / "rows.json").read_text())


def test_part_of_the_rows_still_knows_every_class(run_config, tmp_path):
    rows, described = written(run_config(), tmp_path / "rows")
    assert described["label_names"] == ["animal", "colour"]
    assert described["num_rows"] == {"train": 24, "validation": 6, "test": 6}
    part = rows["train"].filter(lambda row: row["label"] == 1)
    assert part.features["label"] == ClassLabel(names=["animal", "colour"])
    assert part[0]["text"] == "the red 1"


def test_only_the_columns_of_a_training_are_kept_under_their_names(run_config, rows_in, tmp_path):
    for file in rows_in.values():
        with open(file) as lines:
            rows = [json.loads(line) for line in lines]
        with open(file, "w") as lines:
            for row in rows:
                row = {"said": row["text"], "kind": int(row["label"] == "colour"), "spare": 1}
                lines.write(json.dumps(row) + "\n")
    columns = {"text_column_name": "said", "label_column_name": "kind"}
    rows, described = written(run_config(data=columns), tmp_path / "rows")
    assert rows["test"].column_names == ["said", "kind"]
    assert described["label_names"] == ["0", "1"]


def test_text_has_no_labels(run_config, tmp_path):
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = {"task": "text-generation", "model_type": "llama", "config_overrides": shape}
    rows, described = written(run_config(model=model), tmp_path / "rows")
    assert described["label_names"] is None
    assert rows["train"].column_names == ["text"]


def test_a_folder_that_exists_is_left_alone(run_config, tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(RunFolderError, match="exists already"):
        write_rows(run_config(), tmp_path / "rows")
    assert list((tmp_path / "rows").iterdir()) == []
