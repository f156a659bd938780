"""The audit: what it must find, and what it must not mistake for randomness."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.dropout.audit import audited
from pipeline.errors import LeakError


class Inner(nn.Module):
    """Does something random, named by the test."""

    def __init__(self, action) -> None:
        super().__init__()
        self.action = action

    def forward(self, x):
        return self.action(x)


def leaks_of(action) -> list[str]:
    model = nn.ModuleDict({"inner": Inner(action)})
    with audited(model) as leaks:
        model["inner"](torch.ones(2, 3))
    return [str(leak) for leak in leaks]


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (nn.Dropout(0.1), "inner.action (aten.bernoulli_.float)"),
        (nn.functional.dropout, "inner (aten.bernoulli_.float)"),
        (torch.rand_like, "inner (aten.rand_like.default)"),
        (lambda x: x + torch.rand([]), "inner (aten.rand.default)"),
        (torch.bernoulli, "inner (aten.bernoulli.default)"),
        (lambda x: x + np.random.rand(), "the model (numpy.random)"),  # noqa: NPY002
        (lambda x: x + random.random(), "the model (random)"),
    ],
)
def test_randomness_is_found_and_placed(action, expected):
    assert leaks_of(action) == [expected]


def attend(x, rate=0.0):
    return nn.functional.scaled_dot_product_attention(*[x.expand(1, 1, 2, 3)] * 3, dropout_p=rate)


def test_fused_attention_counts_only_where_it_drops():
    assert leaks_of(attend) == []
    assert leaks_of(lambda x: attend(x, 0.5))


def test_layer_drop_counts_only_where_it_drops():
    model = nn.ModuleDict({"inner": Inner(lambda x: x + torch.rand([]))})
    for rate, count in ((0.0, 0), (0.1, 1)):
        model["inner"].layerdrop = rate
        with audited(model) as leaks:
            model["inner"](torch.ones(1))
        assert len(leaks) == count


def test_keyed_dropout_leaks_nothing_and_a_native_draw_in_it_is_found(bind, tokens):
    bound, batch = bind("bert", {"hidden": 0.2, "attention": 0.2}), tokens()
    bound.model.train()
    context = {"purpose": "train", "index": 0, "row_ids": torch.arange(3)}
    with audited(bound.model) as leaks, bound.keyed.context(**context):
        bound.model(**batch)
    assert leaks == []
    site = bound.model.bert.embeddings.dropout
    site.forward = lambda x: torch.native_dropout(x, 0.2, True)[0]
    with audited(bound.model) as leaks, bound.keyed.context(**context) as active:
        bound.model(**batch)
    assert [leak.site for leak in leaks] == ["bert.embeddings.dropout"]
    assert bound.keyed.missing(active) == ["bert.embeddings.dropout#0"]


def test_a_native_dropout_put_back_into_a_bound_model_stops_the_pass(bind, tokens):
    bound = bind("bert", {"hidden": 0.2})
    bound.model.train().bert.embeddings.dropout.__class__ = nn.Dropout
    with (
        pytest.raises(LeakError, match="bert.embeddings.dropout#0 dropped .* not in the dropout"),
        bound.keyed.context(purpose="train", index=0, row_ids=torch.arange(3)),
    ):
        bound.model(**tokens())
