"""Windows: read from every format, labels joined, and all that is wrong said at once."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from monitoring.profile import profile_of
from monitoring.scored import read_window, require_matches
from pipeline.errors import DataError
from pipeline.records import sha256_of_file

ABOUT = {
    "schema": "masklock-scored-v1",
    "model_version": "v1",
    "task": "text-classification",
    "label_names": ["cat", "dog"],
    "carried": ["price"],
    "seed": 42,
}


def scored(num_rows=8, first_id=0, about=ABOUT, **changed):
    columns = {
        "sample_id": list(range(first_id, first_id + num_rows)),
        "prediction": ["cat" if n % 3 else "dog" for n in range(num_rows)],
        "confidence": [0.5 + n / 100 for n in range(num_rows)],
        "energy": [-8.0 - n for n in range(num_rows)],
        "embedding": [[float(n), 1.0] for n in range(num_rows)],
        "price": [1.5 * n for n in range(num_rows)],
    }
    table = pa.table({n: v for n, v in (columns | changed).items() if v is not None})
    return table.replace_schema_metadata({"masklock": json.dumps(about)} if about else None)


@pytest.fixture
def window_of(tmp_path):
    """Writes tables, and reads them as one window."""

    def read(*tables, labels=()):
        paths = [tmp_path / f"{number}.parquet" for number in range(len(tables))]
        for path, table in zip(paths, tables, strict=True):
            pq.write_table(table, path)
        return read_window(paths, labels)

    return read


@pytest.fixture(scope="module")
def reference():
    return profile_of(scored(40), model_version="v1")


def problems_of(window, reference):
    with pytest.raises(DataError) as caught:
        require_matches(window, reference)
    return str(caught.value).split("\n  - ")[1:]


# -- reading -------------------------------------------------------------------------------------


def test_a_window_of_one_file_has_its_rows_hash_and_metadata(window_of):
    window = window_of(scored())
    assert window.num_rows == 8
    assert window.sha256 == sha256_of_file(window.paths[0])
    assert window.metadata["model_version"] == "v1"
    assert window.numbers("price").tolist() == [1.5 * n for n in range(8)]
    assert window.embeddings().dtype == np.float32
    assert window.embeddings().tolist() == [[float(n), 1.0] for n in range(8)]
    assert window.labels() == [None] * 8


def test_several_files_are_one_window_in_their_order(window_of, reference):
    window = window_of(scored(3), scored(5, first_id=3))
    assert window.table["sample_id"].to_pylist() == list(range(8))
    assert window.sha256 not in {sha256_of_file(path) for path in window.paths}
    require_matches(window, reference)


def test_every_format_gives_the_same_rows(tmp_path, reference):
    rows = scored(about=None, correct=[n % 2 == 0 for n in range(8)], label=["dog"] * 8)
    flat = rows.drop_columns(["embedding"])
    pq.write_table(rows, tmp_path / "a.parquet")
    pa.csv.write_csv(flat, tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows.to_pylist())))
    for name in ("a.csv", "a.jsonl"):
        window = read_window([tmp_path / name])
        require_matches(window, reference)
        assert window.table.select(flat.column_names).to_pylist() == flat.to_pylist()
    found = read_window([tmp_path / "a.jsonl"]).embeddings()
    assert found.tolist() == read_window([tmp_path / "a.parquet"]).embeddings().tolist()


def test_classes_that_look_like_numbers_stay_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sample_id,label,prediction,correct\n0,7,7,True\n1,,8,\n")
    window = read_window([path])
    assert window.labels() == ["7", None]
    assert window.texts("prediction") == ["7", "8"]
    assert window.numbers("correct").tolist() == pytest.approx([1.0, np.nan], nan_ok=True)


def test_text_of_several_lines_and_of_megabytes_is_read_from_csv_and_json(tmp_path):
    rows = pa.table({"sample_id": [0, 1], "text": ["def f():\n    return 1\n", "long " * 600_000]})
    pa.csv.write_csv(rows, tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows.to_pylist())))
    for name in ("a.csv", "a.jsonl"):
        assert read_window([tmp_path / name]).texts("text") == rows["text"].to_pylist()


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not enough")
    (tmp_path / "a.csv").write_text("sample_id,correct\nfirst,maybe\n")
    (tmp_path / "a.pickle").write_bytes(b"")
    for name, message in (
        ("a.parquet", "cannot be read as parquet"),
        ("a.csv", "column 'sample_id' was to hold int64.*column 'correct' was to hold bool"),
        ("a.pickle", "is not one of .parquet"),
        ("none.csv", "There is no file"),
    ):
        with pytest.raises(DataError, match=message):
            read_window([tmp_path / name])
    with pytest.raises(DataError, match="at least one file"):
        read_window([])


def test_files_that_were_scored_differently_are_no_window(window_of):
    other = scored(3, about=ABOUT | {"model_version": "v2", "seed": 7})
    with pytest.raises(DataError, match=r"\(model_version v1 and v2, seed 42 and 7\): judge them"):
        window_of(scored(), other)
    with pytest.raises(DataError, match="schema 'masklock-scored-v9'"):
        window_of(scored(about=ABOUT | {"schema": "masklock-scored-v9"}))
    with pytest.raises(DataError, match="only with the same columns; price are in one"):
        window_of(scored(), scored(price=None))


# -- labels --------------------------------------------------------------------------------------


def test_labels_that_arrive_later_are_joined_by_sample(window_of, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("sample_id,label\n1,cat\n0,cat\n77,dog\n2,\n")
    window = window_of(scored(4), labels=[labels])
    assert window.labels() == ["cat", "cat", None, None]
    assert window.table["correct"].to_pylist() == [False, True, None, None]
    assert window.sha256 == window_of(scored(4)).sha256


def test_labels_fill_the_gaps_of_those_that_are_there(window_of, tmp_path):
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"sample_id": 1, "label": "dog"}\n')
    window = window_of(scored(3, label=["cat", None, None]), labels=[labels])
    assert window.labels() == ["cat", "dog", None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample_id,label\n0,cat\n0,dog\n", "sample 0 has two labels, 'cat' and 'dog'"),
        ("sample_id,label\n0,dog\n", "contradicts labels .* 1 samples: 0: 'cat' and 'dog'"),
        ("sample_id,label\n99,dog\n", "labels for 1 samples, but for none of the 3 rows"),
        ("id,label\n0,dog\n", "there is no sample_id, but id, label"),
    ],
)
def test_labels_that_cannot_be_right_are_refused(window_of, tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        window_of(scored(3, label=["cat"] * 3), labels=[tmp_path / "labels.csv"])


# -- what cannot be compared ---------------------------------------------------------------------


def test_all_problems_of_a_window_are_said_at_once(window_of, reference):
    window = window_of(
        scored(
            3,
            about=ABOUT | {"model_version": "v2"},
            sample_id=[5, 5, -1],
            prediction=["cat", "cow", "cow"],
            confidence=None,
            energy=[1.0, np.nan, None],
            embedding=[[1.0, 2.0, 3.0]] * 3,
            price=["cheap"] * 3,
        )
    )
    assert problems_of(window, reference) == [
        "rows were scored by model v2, the reference is of model v1; score them with this run, "
        "or judge them by that model's",
        "there is no column 'confidence'",
        "column 'price' holds string, the reference has double",
        "column 'sample_id' needs whole numbers from 0 on; there is none in row 2",
        "1 sample ids occur more than once: 5",
        "column 'prediction' has 'cow' in rows 1, 2, which is none of the model's classes",
        "column 'energy' has no finite number in rows 1, 2",
        "column 'embedding' has 3 numbers a row, the reference 2",
    ]


def test_an_empty_window_is_refused_and_one_row_is_not(window_of, reference):
    assert problems_of(window_of(scored(0)), reference)[-1] == "there are no rows"
    require_matches(window_of(scored(1)), reference)


def test_a_model_version_may_come_as_a_column(window_of, reference):
    require_matches(window_of(scored(2, about=None, model_version=["v1", "v1"])), reference)
    found = problems_of(window_of(scored(2, about=None, model_version=["v0", "v1"])), reference)
    assert found[0].startswith("rows were scored by model v0, the reference is of model v1")


def test_embeddings_that_are_ragged_or_not_finite_are_refused(window_of, reference):
    ragged = window_of(scored(2, embedding=[[1.0], [1.0, 2.0]]))
    assert "same length" in problems_of(ragged, reference)[0]
    broken = window_of(scored(2, embedding=[[1.0, 2.0], [np.inf, 2.0]]))
    assert "not finite in row 1" in problems_of(broken, reference)[0]


def test_what_production_need_not_have_may_be_missing(window_of, reference):
    require_matches(window_of(scored(embedding=None, price=None, about=None)), reference)
