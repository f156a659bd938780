"""Corpora that every machine carries, one file each: nothing is downloaded."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.corpora.digits import digits
from pipeline.corpora.named_digits import named_digits
from pipeline.corpora.python_stdlib import python_stdlib
from pipeline.corpora.spoken_words import spoken_words

if TYPE_CHECKING:
    from datasets import DatasetDict

BUILTIN: dict[str, Callable[[], "DatasetDict"]] = {
    "builtin:python-stdlib": python_stdlib,
    "builtin:digits": digits,
    "builtin:named-digits": named_digits,
    "builtin:spoken-words": spoken_words,
}
