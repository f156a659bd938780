"""Rows of a challenger: against a plain reference, and every problem of the files with labels."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from launch.retrain.rows import Columns, Sources, mix
from pipeline.errors import DataError

NAMES = ["down", "up"]
COLUMNS = Columns("text", "label")


def write(path: Path, rows: list[tuple[str, int]]) -> Path:
    texts, labels = zip(*rows, strict=True)
    parquet.write_table(pa.table({"text": list(texts), "label": list(labels)}), path)
    return path


def labels(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = tmp_path / "base"
    folder.mkdir()
    write(folder / "train.parquet", [(f"old {n}", n % 2) for n in range(100)])
    write(folder / "validation.parquet", [("valid", 0)])
    write(folder / "test.parquet", [("frozen", 1), ("frozen too", 0)])
    (folder / "rows.json").write_text(json.dumps({"label_names": NAMES}))
    return folder


def mixed(base, output, new=(), learned=(), retention=None, share=0.3, key="k"):
    sources = Sources(base, learned, new, retention or {})
    facts = mix(sources, COLUMNS, share, key, output)
    return facts, parquet.read_table(output / "train.parquet").to_pylist()


def test_new_rows_come_with_a_share_of_the_old_ones(base, tmp_path):
    rows = [{"text": "fresh", "label": "up"}, {"text": "frozen", "label": "up"}]
    rows += [{"text": "old 4", "label": "down"}, {"text": "fresh", "label": "up"}]
    rows += [{"text": "torn", "label": "up"}, {"text": "torn", "label": "down"}]
    facts, train = mixed(base, tmp_path / "out", [labels(tmp_path / "new.jsonl", rows)])
    assert train[0] == {"text": "fresh", "label": 1}
    assert all(row["text"].startswith("old ") for row in train[1:])
    assert facts["new"] == 1
    assert (facts["replayed"], len(train)) == (30, 31)
    assert facts["left_out"] == {"known": 2, "frozen": 1, "contradicted": 2}


def test_the_key_alone_decides_which_old_rows_are_replayed(base, tmp_path):
    one, again, other = (
        {row["text"] for row in mixed(base, tmp_path / name, key=key)[1]}
        for name, key in (("1", "k"), ("2", "k"), ("3", "other"))
    )
    assert one == again
    assert one != other
    assert mixed(base, tmp_path / "4", share=1.0)[0]["replayed"] == 100
    assert mixed(base, tmp_path / "5", share=0.0)[1] == []


def test_every_old_row_has_the_same_chance(base, tmp_path):
    counts = dict.fromkeys((f"old {n}" for n in range(100)), 0)
    for key in range(60):
        for row in mixed(base, tmp_path / "out", key=str(key))[1]:
            counts[row["text"]] += 1
    assert 3 < min(counts.values()) <= max(counts.values()) < 33, "18 each, deviation 3.5"


def test_rows_of_promoted_retrainings_are_old_rows(base, tmp_path):
    learned = write(tmp_path / "learned.parquet", [("fresh", 1)])
    new = labels(tmp_path / "new.jsonl", [{"text": "fresh", "label": "up"}])
    facts, _ = mixed(base, tmp_path / "out", [new], [learned])
    assert (facts["new"], facts["old"]) == (0, 101)


def test_retention_sets_follow_the_frozen_rows(base, tmp_path):
    kept = labels(tmp_path / "kept.jsonl", [{"text": "skill", "label": "down"}] * 3)
    facts, _ = mixed(base, tmp_path / "out", retention={"skills": [kept]})
    test = parquet.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    assert facts["frozen"] == 2
    assert facts["retention"] == {"skills": (2, 5)}
    assert test[2:5] == [{"text": "skill", "label": 0}] * 3


def test_csv_and_parquet_are_read_too(base, tmp_path):
    table = pa.table({"text": ["a", "b"], "label": ["up", "down"], "more": [1, 2]})
    csv.write_csv(table, tmp_path / "new.csv")
    parquet.write_table(table.slice(0, 1), tmp_path / "new.parquet")
    facts, _ = mixed(base, tmp_path / "out", [tmp_path / "new.csv", tmp_path / "new.parquet"])
    assert facts["new"] == 2


def test_every_problem_of_every_file_is_said_at_once(base, tmp_path):
    bad = [
        labels(
            tmp_path / "one.jsonl",
            [{"text": "a", "label": "sideways"}, {"text": " ", "label": "up"}],
        ),
        labels(tmp_path / "two.jsonl", [{"txt": "a", "label": "up"}]),
        tmp_path / "three.xlsx",
    ]
    bad[2].write_text("no")
    (tmp_path / "four.jsonl").write_text("{not json}\n")
    with pytest.raises(DataError) as error:
        mixed(base, tmp_path / "out", [*bad, tmp_path / "four.jsonl"])
    said = str(error.value)
    assert "1 rows have the label 'sideways', which is none of the model's 2" in said
    assert "1 rows have no text, the first is row 1" in said
    assert "has no column text; there are: txt, label" in said
    assert "three.xlsx: rows come as" in said
    assert "four.jsonl cannot be read" in said
