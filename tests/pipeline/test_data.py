"""Loading, the errors of bad data, preparing with a fingerprint, and the one training stream."""

import hashlib
import json
import pickle
from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from pipeline.config.schema import RunConfig
from pipeline.data import TrainingStream, fingerprint_of, load_raw, prepare_data
from pipeline.dropout.philox import permutation
from pipeline.errors import DataError

TEXTS = ["one two", "two three", "three one", "one three"]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def make_config(source, task="text-classification", global_batch_size=2, **data):
    return RunConfig(
        name="t",
        model={"task": task, "model_type": "llama"},
        data={**source, "max_length": 8, **data},
        train={"global_batch_size": global_batch_size},
    )


def saved(folder, **splits):
    """A folder written by save_to_disk, from columns by split."""
    parts = {
        name: rows if isinstance(rows, Dataset) else Dataset.from_dict(rows)
        for name, rows in splits.items()
    }
    DatasetDict(parts).save_to_disk(folder)
    return {"path": str(folder)}


def json_files(folder, **splits):
    files = {}
    for name, rows in splits.items():
        files[name] = str(folder / f"{name}.json")
        (folder / f"{name}.json").write_text("\n".join(json.dumps(row) for row in rows))
    return {"path": "json", "data_files": files}


def rows_of(labels, texts=TEXTS):
    return {"text": texts[: len(labels)], "label": labels}


def all_splits(labels, texts=TEXTS):
    return dict.fromkeys(("train", "validation", "test"), rows_of(labels, texts))


def problems_of(config):
    with pytest.raises(DataError) as caught:
        load_raw(config)
    return str(caught.value)


def make_tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "one", "two", "three"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["b", "a", "b"], ("a", "b")), ([10, 2, 10], ("2", "10")), ([True, False, True], None)],
)
def test_label_names_are_sorted_strings_or_the_integers_in_order(tmp_path, labels, names):
    raw = load_raw(make_config(saved(tmp_path / "d", **all_splits(labels))))
    assert raw.label_names == (names or ("False", "True"))


def test_class_labels_keep_their_own_names_and_order(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a"])})
    rows = Dataset.from_dict(rows_of([1, 0, 1]), features=features)
    config = make_config(saved(tmp_path / "d", train=rows, validation=rows, test=rows))
    raw = load_raw(config)
    assert raw.label_names == ("z", "a")
    assert list(prepare_data(config, raw, make_tokenizer()).train["labels"]) == [1, 0, 1]


def test_files_load_by_split_and_a_slice_is_a_split(tmp_path):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    source = json_files(tmp_path, train=rows, other=rows[:2])
    config = make_config(
        source, train_split="train[:50%]", validation_split="train[50%:]", test_split="other"
    )
    raw = load_raw(config)
    assert list(raw.train["text"]) == TEXTS[:2]
    assert list(raw.validation["text"]) == TEXTS[2:]
    assert not raw.notes


def test_evaluating_on_training_rows_is_said(tmp_path):
    source = saved(tmp_path / "d", train=rows_of([0, 1, 0, 1]))
    config = make_config(source, validation_split="train[:3]", test_split="train[3:]+train[:1]")
    notes = load_raw(config).notes
    assert notes[0].startswith("3 rows of the validation split are training rows")
    assert notes[1].startswith("2 rows of the test split are training rows")


def test_an_ood_set_needs_no_label_and_reads_its_own_columns(tmp_path):
    source = saved(tmp_path / "d", **all_splits([0, 1]))
    far = saved(tmp_path / "far", anything={"query": ["one", "two", "three"]})
    config = make_config(source, ood={"far": {**far, "text_column_name": "query"}})
    prepared = prepare_data(config, load_raw(config), make_tokenizer())
    assert list(prepared.ood["far"]["text"]) == ["one", "two", "three"]
    assert "labels" not in prepared.ood["far"].column_names


def test_an_ood_set_with_several_splits_must_say_which(tmp_path):
    source = saved(tmp_path / "d", **all_splits([0, 1]))
    far = saved(tmp_path / "far", a=rows_of([0]), b=rows_of([0]))
    message = problems_of(make_config(source, ood={"far": far}))
    assert "data.ood.far.split: there are the splits a, b; say which one to read" in message


def test_several_problems_are_listed_together(tmp_path):
    source = saved(
        tmp_path / "d",
        train={"sentence": ["one", " "], "label": ["a", None]},
        validation={"sentence": ["one"], "label": ["c"]},
        test={"sentence": ["one"], "kind": ["a"]},
    )
    message = problems_of(make_config(source, text_column_name="sentence", global_batch_size=4))
    assert message.startswith("data: 6 problems")
    assert "train split: column 'sentence' has no text in row 1" in message
    assert "train split: column 'label' has no label in row 1" in message
    assert "a classification needs two classes, found a" in message
    assert "column 'label' has the label 'c' in row 0, which is none of the 1 names" in message
    assert "test split: there is no column 'label'; there are: sentence, kind" in message
    assert "one global batch takes 4 samples, but there are only 2" in message


def test_a_missing_text_column_is_named_with_those_that_exist(tmp_path):
    source = saved(tmp_path / "d", **all_splits([0, 1]))
    message = problems_of(make_config(source, text_column_name="body"))
    assert "train split: there is no column 'body'; there are: text, label" in message


def test_an_unknown_split_is_named_with_those_that_exist(tmp_path):
    source = saved(tmp_path / "d", train=rows_of([0, 1]), test=rows_of([0, 1]))
    message = problems_of(make_config(source))
    assert "data.validation_split: there is no split 'validation'" in message
    assert "train (2 rows), test (2 rows)" in message


@pytest.mark.parametrize("expression", ["train[90", "train[:200%]", "nope[:3]"])
def test_a_slice_that_cannot_be_read_is_an_error(tmp_path, expression):
    source = saved(tmp_path / "d", **all_splits([0, 1]))
    assert f"there is no split {expression!r}" in problems_of(
        make_config(source, test_split=expression)
    )


def test_mixed_label_types_in_one_column_are_named_with_their_rows(tmp_path):
    rows = [{"text": "one", "label": 1}, {"text": "two", "label": "x"}]
    message = problems_of(make_config(json_files(tmp_path, train=rows, validation=rows, test=rows)))
    assert "mixes types of labels (int 1 in row 0, str 'x' in row 1)" in message


def test_integer_labels_with_gaps_arrive_as_floats_and_the_gaps_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\none,1\ntwo,\nthree,2\n")
    source = {"path": "csv", "data_files": str(tmp_path / "a.csv")}
    message = problems_of(make_config(source, validation_split="train", test_split="train"))
    assert "has no label in row 1" in message
    assert "float" not in message


def test_real_numbers_are_no_labels(tmp_path):
    source = saved(tmp_path / "d", **all_splits([0.5, 1.0]))
    assert "holds float values such as 0.5" in problems_of(make_config(source))


def test_a_split_without_rows_is_an_error(tmp_path):
    source = saved(tmp_path / "d", **all_splits([0, 1]))
    message = problems_of(make_config(source, test_split="test[:0]"))
    assert "test split: there are no rows" in message


def test_a_column_of_numbers_is_no_text(tmp_path):
    source = saved(tmp_path / "d", **all_splits([0, 1], texts=[1, 2]))
    assert "column 'text' holds Value('int64'), not text" in problems_of(make_config(source))


@pytest.mark.parametrize("path", ["./no_such_folder", "nobody/no-such-set"])
def test_a_data_set_that_is_not_there_says_where_it_was_looked_for(path):
    message = problems_of(make_config({"path": path}))
    assert f"The data set {path!r} could not be loaded" in message
    assert "on the Hugging Face hub" in message
    assert "HF_HUB_OFFLINE=1" in message


def test_files_that_are_not_there_are_named(tmp_path):
    source = {"path": "csv", "data_files": str(tmp_path / "gone.csv")}
    message = problems_of(make_config(source))
    assert "gone.csv" in message
    assert "Looked for these files" in message


def test_a_file_given_as_path_is_met_with_the_right_words(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    message = problems_of(make_config({"path": str(tmp_path / "a.jsonl")}))
    assert "say data.path=json data.data_files=" in message


def test_an_unknown_builtin_meets_the_nearest():
    message = problems_of(make_config({"path": "builtin:python-stdlb"}))
    assert "Did you mean builtin:python-stdlib?" in message


def test_a_split_for_the_main_data_is_refused_because_it_would_do_nothing(tmp_path):
    source = saved(tmp_path / "d", **all_splits([0, 1]))
    assert "data.split: has no effect here" in problems_of(make_config(source, split="train"))


def test_blank_lines_are_no_error_for_blocks_but_blank_files_are(tmp_path):
    source = saved(tmp_path / "d", **all_splits([0, 0], texts=["one two three", ""]))
    config = make_config(source, "text-generation", global_batch_size=1)
    assert len(prepare_data(config, load_raw(config), make_tokenizer()).train) == 1
    source = saved(tmp_path / "e", **all_splits([0, 0], texts=[" ", ""]))
    assert "no text in any of the 2 rows" in problems_of(make_config(source, "text-generation"))


def test_too_few_blocks_for_a_global_batch_are_found_when_preparing(tmp_path):
    config = make_config(saved(tmp_path / "d", **all_splits([0, 1])), "text-generation")
    raw = load_raw(config)
    with pytest.raises(DataError, match="takes 2 samples, but there are only 1"):
        prepare_data(config, raw, make_tokenizer())


def test_limits_hold_and_keep_the_ids(tmp_path):
    source = saved(tmp_path / "d", **all_splits([0, 1, 0, 1]))
    config = make_config(source, max_train_samples=3, max_eval_samples=2)
    prepared = prepare_data(config, load_raw(config), make_tokenizer())
    assert [len(part) for part in (prepared.train, prepared.validation, prepared.test)] == [3, 2, 2]
    assert all(row["text"] == TEXTS[row["sample_id"]] for row in prepared.train)


def test_preparing_writes_nothing_beside_the_data(tmp_path):
    source = saved(tmp_path / "d", **all_splits([0, 1]))
    before = sorted((tmp_path / "d").rglob("*"))
    config = make_config(source)
    prepare_data(config, load_raw(config), make_tokenizer())
    assert sorted((tmp_path / "d").rglob("*")) == before


def test_the_fingerprint_sees_values_not_storage():
    columns = {"sample_id": [0, 1, 2], "input_ids": [[1, 2], [3], []], "labels": [0, 1, 1]}
    rows, other = Dataset.from_dict(columns), Dataset.from_dict({**columns, "labels": [0, 1, 0]})
    reordered = Dataset.from_dict({k: v[::-1] for k, v in columns.items()}).select([2, 1, 0])
    moved = Dataset.from_dict({**columns, "input_ids": [[1], [2, 3], []]})
    whole = fingerprint_of({"train": rows})
    assert whole == fingerprint_of({"train": reordered})
    assert len({whole, *(fingerprint_of({"train": part}) for part in (other, moved))}) == 3
    assert whole != fingerprint_of({"test": rows})


def test_the_fingerprint_is_plain_sha256():
    rows = Dataset.from_dict({"sample_id": [4], "input_ids": [[1, 2]]})
    values = [np.array(part, "<i8").tobytes() for part in ([4], [], [1, 2], [2])]
    digests = [hashlib.sha256(part).digest() for part in values]
    text = (
        b"train\x001\0sample_id" + digests[0] + digests[1] + b"input_ids" + digests[2] + digests[3]
    )
    assert fingerprint_of({"train": rows}) == hashlib.sha256(text).hexdigest()


def numbered(num_rows):
    return Dataset.from_dict(
        {
            "sample_id": list(range(num_rows)),
            "input_ids": [[i] for i in range(num_rows)],
            "text": [str(i) for i in range(num_rows)],
        }
    )


def test_the_stream_visits_each_epoch_in_keyed_order_and_leaves_out_the_rest():
    stream = TrainingStream(numbered(11), seed=5, num_steps=7, global_batch_size=4)
    ids = [row["sample_id"] for row in stream]
    expected = np.concatenate([permutation(5, epoch, 11)[:8] for epoch in range(4)])[:28]
    assert len(stream) == 28
    assert ids == expected.tolist()
    assert [row["mask_step"] for row in stream] == [k // 4 for k in range(28)]
    assert set(Counter(ids[:8]).values()) == {1}


def test_rows_of_like_length_come_together_within_their_own_step():
    lengths = [(7 * n) % 5 for n in range(11)]
    plain = TrainingStream(numbered(11), 5, 7, 4)
    grouped = TrainingStream(numbered(11), 5, 7, 4, lengths=lengths)
    for step in range(7):
        taken = [plain[k]["sample_id"] for k in range(4 * step, 4 * step + 4)]
        found = [grouped[k]["sample_id"] for k in range(4 * step, 4 * step + 4)]
        assert found == sorted(taken, key=lambda one: lengths[one])


def test_a_stream_item_depends_on_its_number_alone():
    stream = TrainingStream(numbered(10), seed=1, num_steps=6, global_batch_size=4)
    forward = [stream[k] for k in range(24)]
    clone = pickle.loads(pickle.dumps(stream))
    assert [clone[k] for k in reversed(range(24))][::-1] == forward
    assert set(forward[0]) == {"sample_id", "input_ids", "mask_step"}


def test_loader_workers_see_the_same_stream():
    stream = TrainingStream(numbered(9), seed=1, num_steps=4, global_batch_size=3)
    loader = DataLoader(stream, batch_size=3, num_workers=2, collate_fn=list)
    assert [row for batch in loader for row in batch] == [stream[k] for k in range(12)]


def test_a_stream_ends_and_refuses_fewer_rows_than_a_batch():
    with pytest.raises(IndexError):
        TrainingStream(numbered(4), 0, 2, 2)[4]
    with pytest.raises(DataError, match="takes 5 samples, but there are only 4"):
        TrainingStream(numbered(4), 0, 2, 5)


def test_prepared_rows_and_batches_carry_their_domain(tmp_path):
    rows = rows_of([0, 1, 0, 1]) | {"source": ["web", "lab", "web", "x"]}
    source = saved(tmp_path / "d", **dict.fromkeys(("train", "validation", "test"), rows))
    whole = make_config(source, max_train_samples=3).model_dump()
    whole["data"]["domain_column_name"] = "source"
    whole["dropout"]["domains"] = {"lab": {"hidden": 0.2}, "web": {"hidden": 0.3}}
    config = RunConfig.model_validate(whole)
    data = prepare_data(config, load_raw(config), make_tokenizer())
    code = [1, 0, 1, -1]
    assert all(row["domain"] == code[row["sample_id"]] for row in data.train)
    stream = TrainingStream(data.train, 7, 2, 2)
    assert {"domain", "mask_step"} <= stream[0].keys()
