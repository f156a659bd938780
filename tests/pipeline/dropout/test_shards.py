"""Slices of tensor and sequence parallelism: the mask of a slice is the slice of the mask."""

import itertools

import pytest
import torch

from pipeline.dropout.kernels import cpu
from pipeline.dropout.masks import ActiveMasks, SiteMask
from pipeline.dropout.positions import StackInputs
from pipeline.dropout.shards import Shard, shards_by_site
from pipeline.dropout.sites import Site
from pipeline.errors import DropoutError

KEY = torch.tensor([987654321])
IDS = torch.tensor([70, 2**40 + 3, 12])
FEATURES, LENGTH = 61, 9
OFFSETS = [0, 1, 5, 8, 13, 16, 40]
VARIANTS = {"element": 1, "channel": 1, "token": 1, "block 3": 3, "block 4": 4, "block 16": 16}


@pytest.fixture(params=["numpy", "cpp"])
def kernel(request, monkeypatch):
    library = cpu.library() if request.param == "cpp" else None
    if request.param == "cpp" and library is None:
        pytest.skip("the compiled kernel is not built")
    monkeypatch.setattr(cpu, "library", lambda: library)


def site_mask(variant: str, shape: tuple[int, ...], block_size: int = 1) -> SiteMask:
    role = "attention" if variant == "attention" else "hidden"
    fields = ("module", role, variant, 0.5, True, "", "sample-first", shape)
    return SiteMask(Site("layer.dropout", 0, *fields, block_size=block_size), ("",))


def drawn(mask: SiteMask, x: torch.Tensor, shard: Shard | None = None, **inputs) -> torch.Tensor:
    """What the site makes of a slice."""
    stacks = {"": StackInputs(length=x.shape[-2], **inputs)}
    shards = shards_by_site(shard, [mask.site])
    return mask.apply(ActiveMasks({}, IDS, 0, stacks=stacks, shards=shards), KEY, x)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_positions_of_rows(variant, dtype):
    mask = site_mask(variant.split()[0], (LENGTH, FEATURES), VARIANTS[variant])
    x = (torch.rand(3, LENGTH, FEATURES) + 1).to(dtype)
    whole = drawn(mask, x)
    for feature, position in itertools.product(OFFSETS, [0, 1, 4]):
        part = slice(None), slice(position, position + 4), slice(feature, feature + 19)
        found = drawn(mask, x[part], Shard(feature=feature, position=position))
        assert torch.equal(found, whole[part]), (feature, position)
    assert 0.3 < (whole == 0).float().mean() < 0.7


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_queries_and_keys_of_attention(dtype):
    mask = site_mask("attention", (6, 11, 11))
    x = (torch.rand(3, 6, 11, 11) + 1).to(dtype)
    whole = drawn(mask, x)
    for head, query, key in itertools.product([0, 1, 4], [0, 3], [0, 2, 5]):
        part = slice(None), slice(head, head + 2), slice(query, query + 5), slice(key, key + 6)
        found = drawn(mask, x[part], Shard(head=head, position=query, key=key))
        assert torch.equal(found, whole[part]), (head, query, key)


def test_without_a_key_offset_keys_are_the_slices_own_or_all():
    mask, x = site_mask("attention", (2, 8, 8)), torch.rand(3, 2, 8, 8) + 1
    whole, second = drawn(mask, x), Shard(position=4)
    assert torch.equal(drawn(mask, x[:, :, 4:, 4:], second), whole[:, :, 4:, 4:])
    assert torch.equal(drawn(mask, x[:, :, 4:], second), whole[:, :, 4:])


def test_position_ids_are_global_already():
    mask, x = site_mask("element", (LENGTH, FEATURES)), torch.rand(3, LENGTH, FEATURES) + 1
    ids = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6, 7]]).expand(3, -1)
    whole = drawn(mask, x, position_ids=ids)
    found = drawn(mask, x[:, 4:], Shard(position=4), position_ids=ids[:, 4:])
    assert torch.equal(found, whole[:, 4:])


def test_what_is_pooled_has_features_but_no_position():
    mask, x = site_mask("element", (FEATURES,)), torch.rand(3, FEATURES) + 1
    found = drawn(mask, x[:, 13:40], Shard(feature=13, position=4))
    assert torch.equal(found, drawn(mask, x)[:, 13:40])


def test_gradients_of_a_slice_are_masked_as_the_slice():
    mask = site_mask("element", (LENGTH, FEATURES))
    x = torch.ones(3, LENGTH, 19, requires_grad=True)
    y = drawn(mask, x, Shard(feature=13))
    y.sum().backward()
    assert torch.equal(x.grad, y)


@pytest.mark.parametrize("variant", ["element", "channel"])
def test_the_relaxed_masks_of_learned_rates_are_sliced_too(bind, tokens, variant):
    role = {"rate": 0.3, "learned": True, "variant": variant}
    bound = bind("bert", {"hidden": role, "embedding": 0, "attention": 0, "head": 0})
    mask = next(m for m in bound.keyed._live.values() if m.learned)
    x = torch.rand(3, LENGTH, 24)
    with bound.keyed.context(purpose="train", index=1, row_ids=IDS) as active:
        whole = mask.apply(active, active.keys[mask.call], x)
    shard = {"hidden": Shard(feature=5, position=2)}
    with bound.keyed.context(purpose="train", index=1, row_ids=IDS, shard=shard) as active:
        part = mask.apply(active, active.keys[mask.call], x[:, 2:, 5:16])
    torch.testing.assert_close(part, whole[:, 2:, 5:16])


def test_a_model_that_sees_the_second_half_of_a_sequence_draws_its_half(bind, tokens):
    bound = bind("llama", {"insert": {"embedding": 0.3, "hidden": 0.3}, "attention": 0.2})
    seen: list[torch.Tensor] = []
    bound.keyed.observer = lambda mask, active, key, x: seen.append(
        mask.apply(active, key, torch.ones_like(x)) > 0
    )
    batch = tokens(3, 8)
    bound.model.eval()
    with torch.no_grad(), bound.keyed.context(purpose="mc", index=2, row_ids=IDS):
        bound.model(input_ids=batch["input_ids"])
    whole, seen[:] = list(seen), []
    second = bound.keyed.context(purpose="mc", index=2, row_ids=IDS, shard=Shard(position=4))
    with torch.no_grad(), second:
        bound.model(input_ids=batch["input_ids"][:, 4:], position_ids=None)
    assert len(seen) == len(whole) >= 4
    for half, all_of_it in zip(seen, whole, strict=True):
        is_attention = half.dim() == 4
        expected = all_of_it[:, :, 4:, 4:] if is_attention else all_of_it[:, 4:]
        assert torch.equal(half, expected)


def test_roles_are_cut_apart(bind):
    bound = bind("bert", {"hidden": 0.3, "attention": 0.2, "embedding": 0.1})
    shards = {"attention": Shard(head=1), "hidden": Shard(position=3)}
    with bound.keyed.context(purpose="mc", index=0, row_ids=IDS, shard=shards) as active:
        found = {call[1].rpartition(".")[0][-9:]: shard for call, shard in active.shards.items()}
        assert set(found.values()) == set(shards.values())
        assert not any("embeddings" in call[1] for call in active.shards)
        assert active.snapshot().shards == active.shards


def test_what_cannot_be_is_refused(bind):
    with pytest.raises(DropoutError, match="A shard's feature must lie between 0 and .* it is -1"):
        Shard(feature=-1)
    bound = bind("bert", {"hidden": 0.3})
    with pytest.raises(DropoutError, match="given for hiden, but no site .* in force: "):
        bound.keyed.context(
            purpose="mc", index=0, row_ids=IDS, shard={"hiden": Shard(head=1)}
        ).__enter__()


def test_noise_needs_the_whole_sequence(bind):
    bound = bind("llama", {}, train={"extra": {"neftune_noise_alpha": 5.0}})
    opened = bound.keyed.context(purpose="train", index=0, row_ids=IDS, shard=Shard(position=4))
    with pytest.raises(DropoutError, match="embed_tokens#0 draws by the whole sequence"):
        opened.__enter__()
