"""Modality dropout: the exact joint distribution, and one draw a sample wherever it runs."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from pipeline.config.dropout import DropoutConfig
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.decisions import masked_channels
from pipeline.dropout.key import derive_key, signed
from pipeline.dropout.modality import ModalityDropout, modality_notes, with_channels
from pipeline.dropout.philox import philox_words
from pipeline.dropout.plan import DropoutPlan
from pipeline.dropout.sites import Site

NUM_DRAWS = 100_000


class Head(nn.Module):
    """Nothing but the site."""

    def __init__(self):
        super().__init__()
        self.modality = ModalityDropout()

    def forward(self, present):
        return self.modality(present)


def make_plan(rates, in_passes=False) -> DropoutPlan:
    site = Site("modality", 0, "modality", "modality", "modality", 1.0, False, "", "sample-first",
                (len(rates),))  # fmt: skip
    config = DropoutConfig(modality=rates, modality_in_passes=in_passes)
    return DropoutPlan(with_channels([site], config, list(rates)))


def drawn(rates, ids, seed=1, purpose="train", index=3, in_passes=False) -> np.ndarray:
    """1 where a channel is there, [B, channels]."""
    keyed = KeyedDropout(Head(), make_plan(rates, in_passes), seed)
    rows = torch.as_tensor(ids)
    with keyed.context(purpose=purpose, index=index, row_ids=rows):
        present = keyed.model(torch.ones(len(rows), len(rates)))
    keyed.release()
    return present.numpy()


@pytest.mark.parametrize(
    "rates",
    [{"image": 0.15, "text": 0.3}, {"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.0, "c": 0.2, "d": 0.6}],
)
def test_channels_are_masked_as_often_as_the_rates_say_and_one_at_most(rates):
    masked = drawn(rates, np.arange(NUM_DRAWS)) == 0
    assert masked.sum(1).max() <= 1
    counts = [*masked.sum(0), (masked.sum(1) == 0).sum()]
    exact = [*rates.values(), 1 - sum(rates.values())]
    possible = [place for place, p in enumerate(exact) if p > 1e-12]
    assert all(count == 0 for place, count in enumerate(counts) if place not in possible)
    expected = [NUM_DRAWS * exact[place] for place in possible]
    assert stats.chisquare([counts[place] for place in possible], expected).pvalue > 1e-3


def test_the_draw_is_word_0_of_the_key_of_the_site():
    ids = np.arange(1000, dtype=np.uint64)
    key = derive_key(1, "train", 3, "modality", "modality", 0)
    uniform = philox_words(key, 0, 0, ids)[:, 0] / 2.0**32
    expected = np.stack([uniform < 0.15, (uniform >= 0.15) & (uniform < 0.45)], axis=1)
    assert np.array_equal(drawn({"image": 0.15, "text": 0.3}, np.arange(1000)) == 0, expected)


def test_a_sample_is_masked_the_same_in_any_batch_and_otherwise_in_another_step():
    rates, ids = {"image": 0.3, "text": 0.3}, np.arange(64)
    whole = drawn(rates, ids)
    assert np.array_equal(drawn(rates, ids[::-1].copy())[::-1], whole)
    assert np.array_equal(
        np.concatenate([drawn(rates, part) for part in ids.reshape(4, 16)]), whole
    )
    assert not np.array_equal(drawn(rates, ids, index=4), whole)


def test_draws_of_neighbours_and_of_steps_have_nothing_to_do_with_each_other():
    masked = drawn({"a": 0.5, "b": 0.0}, np.arange(NUM_DRAWS))[:, 0] == 0
    later = drawn({"a": 0.5, "b": 0.0}, np.arange(NUM_DRAWS), index=4)[:, 0] == 0
    for one, other in ((masked[:-1], masked[1:]), (masked, later)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 3 / np.sqrt(NUM_DRAWS)


def test_monte_carlo_passes_see_every_channel_unless_asked_otherwise():
    rates, ids = {"image": 0.4, "text": 0.4}, np.arange(64)
    assert drawn(rates, ids, purpose="mc").all()
    asked = drawn(rates, ids, purpose="mc", in_passes=True)
    assert not asked.all()
    assert not np.array_equal(asked, drawn(rates, ids, in_passes=True))
    assert make_plan(rates).in_passes() == []
    assert len(make_plan(rates, in_passes=True).in_passes()) == 1
    assert "not: they see" in modality_notes(make_plan(rates).sites)[0]


def test_passes_stacked_on_the_batch_draw_what_each_draws_alone():
    rates, ids = {"image": 0.4, "text": 0.4}, torch.arange(16)
    keyed = KeyedDropout(Head(), make_plan(rates, in_passes=True), 1)
    index = [0] * 16 + [1] * 16
    with keyed.context(purpose="mc", index=index, row_ids=ids.repeat(2)):
        both = keyed.model(torch.ones(32, 2)).numpy()
    keyed.release()
    alone = [drawn(rates, ids, purpose="mc", index=i, in_passes=True) for i in (0, 1)]
    assert np.array_equal(both, np.concatenate(alone))


def test_a_plan_comes_back_from_its_file_with_the_rates_of_channels():
    plan = make_plan({"image": 0.15, "text": 0.3})
    assert DropoutPlan.from_json(plan.to_json()) == plan
    assert "0.45 (image 0.15, text 0.3)" in plan.table()
    assert plan.digest != make_plan({"image": 0.3, "text": 0.15}).digest


def test_without_rates_the_site_is_there_and_not_in_force():
    plan = make_plan({"image": 0.0, "text": 0.0})
    assert [site.reason for site in plan.sites] == ["rate 0"]
    assert plan.in_force() == []


def test_a_rate_of_one_masks_always():
    key = torch.tensor([signed(derive_key(5, "train", 0, "modality", "m", 0))])
    rates = torch.tensor([0.0, 1.0], dtype=torch.float64)
    masked = masked_channels(key, torch.arange(1000), rates)
    assert masked.sum(0).tolist() == [0, 1000]
