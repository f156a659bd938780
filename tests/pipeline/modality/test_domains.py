"""Domains of rows: numbered for the plan, kept through limits and batches, errors by name."""

import pytest
from datasets import ClassLabel, Dataset

from pipeline.config.schema import RunConfig
from pipeline.modality.domains import domain_problems, with_domains

DOMAINS = {"web": {"hidden": 0.3}, "book": {"hidden": 0.1}}
ROWS = Dataset.from_dict({"text": list("abcd"), "source": ["web", "book", "other", "web"]})


def make_config(domains=DOMAINS, column="source", task="text-classification"):
    data = {"path": "unused", "domain_column_name": column}
    model = {"task": task, "model_type": "bert"}
    return RunConfig(name="t", model=model, data=data, dropout={"domains": domains})


def codes(rows, sample_ids):
    return with_domains(Dataset.from_dict({"sample_id": sample_ids}), rows, make_config())["domain"]


def test_a_sample_carries_the_place_of_its_domain_among_the_sorted_names():
    assert list(codes(ROWS, [0, 1, 2, 3])) == [1, 0, -1, 1]
    assert list(codes(ROWS, [3, 1])) == [1, 0]


def test_class_labels_are_domains_by_name():
    names = ClassLabel(names=["book", "other", "web"])
    assert list(codes(ROWS.cast_column("source", names), [0, 2])) == [1, -1]


def test_sets_without_the_column_keep_the_rates_of_their_roles():
    assert list(codes(ROWS.remove_columns(["source"]), [0, 1])) == [-1, -1]


def test_domains_that_no_training_row_has_are_listed():
    config = make_config({**DOMAINS, "wab": {"hidden": 0.2}, "boks": {"hidden": 0.2}})
    problems = domain_problems({"train": ROWS, "test": ROWS}, config, True)
    assert [problem.partition(":")[0] for problem in problems] == [
        "dropout.domains.boks",
        "dropout.domains.wab",
    ]
    assert problems[0].endswith("it has: book, other, web")


def test_a_split_without_the_column_is_an_error():
    rows = ROWS.remove_columns(["source"])
    (problem,) = domain_problems({"train": ROWS, "test": rows}, make_config(), True)
    assert problem.startswith("test split: there is no column 'source'")


def test_blocks_of_joined_rows_have_no_domain():
    (problem,) = domain_problems({"train": ROWS}, make_config(task="text-generation"), False)
    assert "joins rows into blocks" in problem


def test_domains_and_their_column_go_together():
    with pytest.raises(ValueError, match="go together"):
        make_config({})
    with pytest.raises(ValueError, match="go together"):
        make_config(column=None)
