"""The fused attention kernel, interpreted on the CPU, against plain attention with the CPU's mask.

test_flash.py runs this file with TRITON_INTERPRET=1, which must be set before Triton is there.
"""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.kernels import flash, keyed_attention
from pipeline.dropout.kernels.flash import flash_attention
from pipeline.model import build_model, plan_for

B, H, Q, K, D = 2, 2, 19, 37, 24


def products(self, a, b, d, *rest):
    """The interpreter's own takes the bits of bfloat16 for whole numbers."""
    values = [
        (x.data.astype(np.uint32) << 16).view(np.float32) if x.data.dtype == np.uint16 else x.data
        for x in (a, b)
    ]
    product = np.matmul(*values, dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


InterpreterBuilder.create_dot = products


def coordinates(keys=K, threshold=20000):
    ids = torch.arange(B)[:, None] + 7
    places = (torch.arange(keys) - torch.tensor([[0], [5]])).clamp(min=0)
    scale = 65536 / (65536 - threshold)
    queries = torch.arange(Q)[None] + 3
    row = (torch.tensor([[7**20], [-(5**20)]]), ids, queries)
    full = [t.expand(B, Q) for t in row]
    shared = [torch.tensor(t).expand(B, Q) for t in (threshold, scale)]
    return (*full, places, *shared)


def plain(q, k, v, mask, row, scaling, head_offset=0):
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q.float() @ k.float().transpose(2, 3) * scaling
    p = torch.softmax(scores if mask is None else scores + mask.float(), -1)
    return keyed_attention(p, *row, head_offset) @ v.float()


def masks(kind):
    if kind == "none":
        return None
    least = torch.finfo(torch.float32).min
    if kind == "causal":
        later = torch.arange(K)[None] > torch.arange(Q)[:, None] + K - Q
        return torch.zeros(1, 1, Q, K).masked_fill(later, least)
    if kind == "left padding":
        mask = torch.zeros(B, 1, Q, K)
        mask[1, ..., :5] = least
        mask[1, :, :3] = least  # rows of padding see nothing
        return mask
    return torch.randn(B, H, Q, K)  # a position bias of each head


@pytest.mark.parametrize(
    ("kind", "dtype", "kv_heads"),
    [
        pytest.param("none", torch.float32, H, marks=pytest.mark.drill),
        pytest.param("causal", torch.float32, H // 2, marks=pytest.mark.drill),
        ("left padding", torch.float32, H),
        pytest.param("bias", torch.float32, H // 2, marks=pytest.mark.drill),
        ("causal", torch.bfloat16, H // 2),
        pytest.param("causal", torch.float16, H, marks=pytest.mark.drill),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_plain_attention(kind, dtype, kv_heads):
    torch.manual_seed(0)
    heads = (H, kv_heads, kv_heads)
    shapes = [(B, h, n, w) for h, n, w in zip(heads, (Q, K, K), (D, D, 16), strict=True)]
    q, k, v = (torch.randn(s).to(dtype).requires_grad_() for s in shapes)
    mask, row, gradient = masks(kind), coordinates(), torch.randn(B, H, Q, 16)
    out = flash_attention(q, k, v, mask, row, 0.3, 5)
    found = [out, *torch.autograd.grad(out, (q, k, v), gradient.to(dtype))]
    expected = plain(q, k, v, mask, row, 0.3, 5)
    wanted = [expected, *torch.autograd.grad(expected, (q, k, v), gradient.to(dtype).float())]
    tolerance = 2e-5 if dtype == torch.float32 else 4e-2 if dtype == torch.bfloat16 else 4e-3
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        error = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert error < tolerance


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_mask_is_that_of_the_cpu_bit_for_bit(is_packed):
    """Equal scores and an identity of values: what comes out is the mask itself."""
    q, k = torch.zeros(B, H, Q, 16), torch.zeros(B, H, K, 16)
    v = torch.eye(K).expand(B, H, K, K)
    keys, ids, queries, places, *limits = coordinates()
    if is_packed:  # several documents a row, each with its own id and its own positions
        ids, queries, places = ids + torch.arange(Q) // 7, queries % 7, places % 11
    row = (keys, ids, queries, places, *limits)
    kept = flash_attention(q, k, v, None, row, 1.0, 9) != 0
    assert kept.equal(keyed_attention(torch.ones(B, H, Q, K), *row, 9) != 0)


def test_values_may_lie_anywhere_in_memory():
    q, k, v = (torch.randn(B, n, H, D).transpose(1, 2) for n in (Q, K, K))
    out = flash_attention(q, k, v.mT.contiguous().mT, None, coordinates(), 0.2)
    torch.testing.assert_close(out, plain(q, k, v, None, coordinates(), 0.2))


@pytest.mark.parametrize(("place", "value"), [(2, 2**32), (4, 65537)])
def test_a_row_that_means_nothing_is_no_number(place, value):
    row = [t.clone() for t in coordinates()]
    row[place][1, 4] = value
    q, k, v = (torch.randn(B, H, n, D) for n in (Q, K, K))
    out = flash_attention(q, k, v, None, tuple(row), 0.2)
    assert out[1, :, 4].isnan().all()
    assert out.isnan().sum() == H * D


@pytest.mark.parametrize(
    ("family", "fused"),
    [
        pytest.param("llama", True, marks=pytest.mark.drill),
        ("bert", True),
        ("t5", False),
        ("gemma2", False),
    ],
)
def test_a_model_takes_the_kernel_where_it_gives_what_eager_gives(
    config_of, monkeypatch, family, fused
):
    options = {"model": {"model_type": family}, "overrides": {"attn_logit_softcapping": 0.5}}
    config = config_of(*(("llama", {"attention": 0.2}) if family == "gemma2" else
                         (family, {"attention": 0.2})),
                       **(options if family == "gemma2" else {}))  # fmt: skip
    plan, calls = plan_for(config), []
    model = build_model(config, None, plan).train()
    keyed, ids = KeyedDropout(model, plan, 3), torch.randint(4, 60, (2, 9))
    ids[:, -1] = 1
    mask = torch.ones_like(ids)
    mask[1, :4] = 0

    def outcome():
        model.zero_grad()
        with keyed.context(purpose="train", index=1, row_ids=torch.arange(2)) as active:
            logits = model(input_ids=ids, attention_mask=mask).logits
            logits[..., :1].square().sum().backward()
            assert not keyed.missing(active)
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = outcome()
    own = flash.flash_attention
    monkeypatch.setattr(flash, "ready", lambda device: True)
    monkeypatch.setattr(flash, "flash_attention", lambda *a: calls.append(1) or own(*a))
    torch.testing.assert_close(outcome(), expected, rtol=1e-3, atol=1e-5)
    assert bool(calls) == fused
