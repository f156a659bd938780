"""Which positions a site's mask is drawn for."""

import torch

from pipeline.dropout import kernels
from pipeline.dropout.masks import ActiveMasks, SiteMask
from pipeline.dropout.philox import scale, threshold
from pipeline.dropout.positions import StackInputs
from pipeline.dropout.sites import Site

KEY = torch.tensor([987654321])
IDS = torch.tensor([70, 12])


def site_mask(name: str, shape: tuple[int, ...], variant: str) -> SiteMask:
    site = Site(name, 0, "module", "any", variant, 0.5, True, "", "sample-first", shape)
    return SiteMask(site, ("decoder", ""))


def active_with(**stacks: StackInputs) -> ActiveMasks:
    return ActiveMasks(keys={}, row_ids=IDS, index=0, stacks=stacks)


def attention_by_hand(x, queries, keys):
    t = threshold(0.5)
    limits = torch.tensor([[t]]), torch.tensor([[scale(t)]])
    places = torch.tensor(queries), torch.tensor(keys)
    return kernels.attention(x, KEY[:, None], IDS[:, None], *places, *limits)


def test_cross_attention_pairs_the_decoders_positions_with_the_encoders():
    encoder_mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    inputs = StackInputs(length=2, cache_length=5, encoder_attention_mask=encoder_mask)
    x = torch.rand(2, 3, 2, 4) + 1
    found = site_mask("decoder.block.0.EncDecAttention", (3, 8, 8), "attention").apply(
        active_with(decoder=inputs), KEY, x
    )
    expected = attention_by_hand(x, [[5, 6]], [[0, 0, 1, 2], [0, 1, 2, 3]])
    assert torch.equal(found, expected)


def test_heads_folded_into_the_batch_are_told_apart():
    x = torch.rand(6, 4, 4) + 1
    found = site_mask("layer", (3, 8, 8), "attention").apply(active_with(), KEY, x)
    expected = attention_by_hand(x.view(2, 3, 4, 4), [[0, 1, 2, 3]], [[0, 1, 2, 3]])
    assert torch.equal(found.view(2, 3, 4, 4), expected)


def test_the_nearest_stack_says_where_tokens_stand():
    far, near = StackInputs(length=3, cache_length=9), StackInputs(length=3, cache_length=4)
    mask, x = site_mask("decoder.dropout", (8, 5), "element"), torch.ones(2, 3, 5)
    alone = mask.apply(active_with(decoder=near), KEY, x)
    both = mask.apply(ActiveMasks({}, IDS, 0, stacks={"": far, "decoder": near}), KEY, x)
    assert torch.equal(both, alone)
    assert not torch.equal(both, mask.apply(active_with(decoder=far), KEY, x))


def test_what_is_pooled_has_no_position():
    mask, x = site_mask("dropout", (64,), "element"), torch.ones(2, 64)
    one_cached = StackInputs(length=1, cache_length=7)
    assert torch.equal(
        mask.apply(active_with(decoder=one_cached), KEY, x), mask.apply(active_with(), KEY, x)
    )


def test_stacks_of_a_bound_model_are_ordered_from_the_inside(bind):
    bound = bind("t5", {"hidden": 0.2})
    mask = bound.keyed._live["module", "transformer.encoder.block.0.layer.0.dropout", 0]
    assert mask.stacks == ("transformer.encoder", "transformer", "")
