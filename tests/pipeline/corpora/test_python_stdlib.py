"""The functions of the standard library as a corpus: disjoint, deterministic, parseable."""

import ast
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from pipeline.corpora.python_stdlib import (
    HELD_OUT,
    PACKAGES,
    collect,
    functions_of,
    python_stdlib,
)


@pytest.fixture(scope="module")
def corpus():
    return python_stdlib()


def test_every_package_has_enough_rows_to_learn_from(corpus):
    counts = Counter(corpus["train"]["package"])
    assert set(counts) == set(PACKAGES)
    assert min(counts.values()) >= 40
    assert corpus["train"].num_rows >= 1800
    assert corpus["validation"].num_rows == corpus["test"].num_rows == 300
    assert corpus["ood"].num_rows >= 100


def test_no_text_stands_in_two_rows(corpus):
    texts = [text for split in corpus.values() for text in split["text"]]
    assert len(texts) == len(set(texts))


def test_labels_name_the_package_and_held_out_packages_have_none(corpus):
    names = corpus["test"].features["label"].names
    assert [names[label] for label in corpus["test"]["label"]] == list(corpus["test"]["package"])
    assert set(corpus["ood"]["label"]) == {-1}
    assert set(corpus["ood"]["package"]) == set(HELD_OUT)


def test_every_row_is_the_source_of_one_function(corpus):
    for text in corpus["test"]["text"]:
        (node,) = ast.parse(text).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def test_reading_again_gives_the_same_rows_in_an_order_of_their_own():
    library = Path(sysconfig.get_path("stdlib"))
    rows = collect.__wrapped__(("argparse", "typing"), library)
    assert rows == collect.__wrapped__(("argparse", "typing"), library)
    assert set(rows) == set(collect.__wrapped__(("typing", "argparse"), library))
    assert len({row.package for row in rows[:20]}) == 2


def test_a_module_gives_its_methods_with_decorators_but_not_nested_functions(tmp_path):
    source = """
class A:
    @property
    def f(self):
        def g():
            pass
        return g
"""
    (tmp_path / "tool.py").write_text(source)
    (function,) = functions_of("tool", tmp_path)
    assert function.text.startswith("@property\ndef f(self):\n    def g():")
