"""Both kernels against a plain loop and each other: masks, products, gradients, statistics."""

import os
import shutil

import numpy as np
import pytest
import torch

from pipeline.dropout import kernels
from pipeline.dropout.kernels import cpu, keyed_attention, keyed_rows, reference
from pipeline.dropout.philox import philox4x32_10, scale, threshold
from pipeline.errors import DropoutError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEY = 0x0123456789ABCDEF


def compiled() -> cpu.Library:
    """The compiled kernel. Where there is a compiler it must have been built."""
    library = cpu.library()
    if library is None and os.environ.get("MASKLOCK_KERNEL") == "numpy":
        pytest.skip("MASKLOCK_KERNEL=numpy asks for the reference alone")
    if library is None and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler here, so numpy serves alone")
    assert library, "g++ is here, but the compiled kernel is not: run `pip install -e .` again"
    return library


@pytest.fixture(params=["numpy", "cpp"])
def kernel(request, monkeypatch):
    library = compiled() if request.param == "cpp" else None
    monkeypatch.setattr(cpu, "library", lambda: library)
    return request.param


def row_tensors(shape=(3, 4), p=0.3):
    """Keys, row ids, positions, thresholds, scales of a batch: shared where they can be."""
    samples, positions = shape
    t = threshold(p)
    return (
        torch.tensor(KEY),
        torch.arange(samples)[:, None] + 100,
        torch.arange(positions),
        torch.tensor(t),
        torch.tensor(scale(t)),
    )


def plain_lane(key, c0, c1, row_id, lane):
    word = int(philox4x32_10(key, [c0, c1, row_id % 2**32, row_id >> 32])[lane // 2])
    return word >> 16 if lane % 2 else word & 0xFFFF


def plain_keep(x, group=1, p=0.3):
    """The mask of `row_tensors`, one element at a time."""
    keep = torch.empty(x.shape, dtype=torch.bool)
    for b, m, d in np.ndindex(*x.shape):
        place = d // group
        keep[b, m, d] = plain_lane(KEY, place // 8, m, 100 + b, place % 8) >= threshold(p)
    return keep


def plain_attention_keep(x, columns, p=0.3, head_offset=0):
    keep = torch.empty(x.shape, dtype=torch.bool)
    for b, h, q, k in np.ndindex(*x.shape):
        column = int(columns[b, k])
        c0 = (h + head_offset) << 20 | column // 8
        keep[b, h, q, k] = plain_lane(KEY, c0, q, 100 + b, column % 8) >= threshold(p)
    return keep


def test_the_active_kernel_is_named(kernel):
    assert kernels.active_kernel().startswith(kernel)


@pytest.mark.parametrize("group", [1, 3, 8, 21, 1000])
def test_row_masks_equal_a_plain_loop(kernel, group):
    x = torch.ones(3, 4, 21)
    assert torch.equal(kernels.rows(x, *row_tensors(), group) != 0, plain_keep(x, group))


@pytest.mark.parametrize(
    "columns",
    [
        torch.arange(13).expand(3, 13),
        torch.arange(13).expand(3, 13) + 2**23 - 13,
        (torch.arange(13) - torch.tensor([[0], [4], [9]])).clamp(min=0),
        torch.tensor([5, 4000, 0, 8388607, 6, 7, 8, 9, 2047, 2048, 3, 3, 12]).expand(3, 13),
    ],
    ids=["from 0", "at the limit", "left padding", "anywhere"],
)
def test_attention_masks_equal_a_plain_loop(kernel, columns):
    x = torch.ones(3, 2, 4, 13)
    keys, ids, queries, *rest = row_tensors()
    y = kernels.attention(x, keys, ids, queries, columns, *rest, head_offset=5)
    assert torch.equal(y != 0, plain_attention_keep(x, columns, head_offset=5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_made_wide_and_rounded_once(kernel, dtype):
    x = (torch.linspace(-9, 9, 3 * 4 * 40).reshape(3, 4, 40) ** 7).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    product = (x.to(wide) * torch.tensor(scale(threshold(0.3))).to(wide)).to(dtype)
    expected = product.where(plain_keep(x), torch.zeros((), dtype=dtype))
    assert torch.equal(kernels.rows(x, *row_tensors()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_is_scaled_like_torch_does(kernel, dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, 1, -1)
    for factor in (1.0, 1.1111186742782593, 3e-5, 6e4):
        row = (*row_tensors((1, 1), p=0)[:4], torch.tensor(factor))
        expected = (x.float() * factor).to(dtype)
        torch.testing.assert_close(kernels.rows(x, *row), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_values_are_zero_even_where_they_were_no_numbers(kernel, dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype).repeat(3, 4, 7)
    y, keep = kernels.rows(x, *row_tensors()), plain_keep(x)
    assert (y[~keep] == 0).all()
    assert not torch.signbit(y[~keep]).any()
    assert torch.equal(y[keep].isnan(), x[keep].isnan())


@pytest.mark.parametrize(("p", "expected"), [(0.0, 2.5), (1.0, 0.0)])
def test_rates_of_0_and_1_keep_all_and_nothing(kernel, p, expected):
    y = kernels.rows(torch.full((3, 4, 50), 2.5), *row_tensors(p=p))
    assert (y == expected).all()


def test_every_row_has_its_own_key_rate_and_scale(kernel):
    x = torch.randn(3, 4, 30)
    keys, ids, positions = (t.expand(3, 4) for t in row_tensors()[:3])
    keys = keys + torch.arange(12).reshape(3, 4)
    thresholds, scales = torch.arange(12).reshape(3, 4) * 5000, torch.rand(3, 4)
    y = kernels.rows(x, keys, ids, positions, thresholds.int(), scales)
    for b, m in np.ndindex(3, 4):
        row = [t[b, m] for t in (keys, ids, positions, thresholds, scales)]
        assert torch.equal(kernels.rows(x[b, m][None, None], *row)[0, 0], y[b, m])


@pytest.mark.parametrize(
    "spread",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
        lambda x: x[:, :1, :1].expand(3, 4, 21),
        lambda x: x[:1].expand(3, 4, 21),
    ],
    ids=["features first", "positions first", "every other", "one value", "one sample"],
)
def test_values_may_lie_anywhere_in_memory(kernel, spread):
    x = spread(torch.randn(3, 4, 21))
    before = x.clone()
    assert torch.equal(kernels.rows(x, *row_tensors()), kernels.rows(before, *row_tensors()))
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0)])
def test_empty_tensors_stay_empty(kernel, shape):
    x = torch.ones(shape, requires_grad=True)
    y = keyed_rows(x, *row_tensors(shape[:2]))
    y.sum().backward()
    assert y.shape == shape == x.grad.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_the_same_mask_on_the_gradient(kernel, dtype):
    x = torch.randn(3, 4, 21).to(dtype).requires_grad_()
    gradient = torch.randn(3, 4, 21).to(dtype)
    keyed_rows(x, *row_tensors()).backward(gradient)
    wide = gradient.double() if dtype == torch.float64 else gradient.float()
    expected = (wide * scale(threshold(0.3)) * plain_keep(x)).to(dtype)
    assert torch.equal(x.grad, expected)


def test_the_gradient_of_attention_is_the_same_mask_on_the_gradient(kernel):
    x = torch.rand(3, 2, 4, 13, requires_grad=True)
    keys, ids, queries, *rest = row_tensors()
    columns = (torch.arange(13) - torch.tensor([[0], [4], [9]])).clamp(min=0)
    keyed_attention(x, keys, ids, queries, columns, *rest).sum().backward()
    keep = plain_attention_keep(x, columns)
    assert torch.equal(x.grad, keep * torch.tensor(scale(threshold(0.3))))


def test_second_derivatives_are_right(kernel):
    x = torch.randn(2, 2, 9, dtype=torch.float64, requires_grad=True)
    row = row_tensors((2, 2))
    assert torch.autograd.gradgradcheck(lambda x: keyed_rows(x, *row) ** 2, x)


def test_nothing_as_large_as_a_mask_is_kept_for_backward(kernel):
    kept = []
    x = torch.randn(3, 4, 1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        keyed_rows(x, *row_tensors())
    assert sum(t.untyped_storage().nbytes() for t in kept) <= 8 * (3 + 4 + 3)


@pytest.mark.parametrize("masked", [keyed_rows, kernels.rows])
def test_no_gradient_is_recorded_where_none_is_wanted(kernel, masked):
    assert not masked(torch.ones(3, 4, 8), *row_tensors()).requires_grad


def test_a_model_without_weights_gets_shapes_only(kernel):
    y = keyed_rows(torch.ones(3, 4, 8, device="meta", requires_grad=True), *row_tensors())
    assert (y.device.type, y.shape) == ("meta", (3, 4, 8))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (2, torch.tensor(2**32), "positions"),
        (2, torch.tensor(-1), "positions"),
        (3, torch.tensor(65537), "thresholds"),
        (3, torch.tensor(-1), "thresholds"),
        (1, torch.arange(5)[:, None], r"row_ids must broadcast to \[3, 4\]"),
    ],
)
def test_row_tensors_that_mean_nothing_are_refused(kernel, name, value, message):
    row = list(row_tensors())
    row[name] = value
    with pytest.raises(DropoutError, match=message):
        kernels.rows(torch.ones(3, 4, 8), *row)


@pytest.mark.parametrize(
    ("heads", "offset", "column", "message"),
    [(2, 4095, 0, "heads 0 to 4095"), (1, 0, 2**23, "key positions 0 to"), (1, 0, -1, "key pos")],
)
def test_attention_beyond_the_counter_is_refused(kernel, heads, offset, column, message):
    keys, ids, queries, *rest = row_tensors((1, 1))
    x, columns = torch.ones(1, heads, 1, 1), torch.tensor([[column]])
    with pytest.raises(DropoutError, match=message):
        kernels.attention(x, keys, ids, queries, columns, *rest, head_offset=offset)


def test_integers_are_not_masked(kernel):
    with pytest.raises(DropoutError, match=r"not torch\.int64"):
        kernels.rows(torch.ones(3, 4, 8, dtype=torch.int64), *row_tensors())


@pytest.mark.parametrize("seed", range(40))
def test_both_kernels_agree_on_anything(seed):
    random, library = np.random.default_rng(seed), compiled()
    torch.manual_seed(seed)
    b, h, q = random.integers(1, 5, 3).tolist()
    k = int(random.choice([1, 7, 8, 64, 129, 2048, 2049, 4500]))
    x = torch.randn(b, h, q, k).to(DTYPES[seed % 4])
    words = torch.randint(-(2**63), 2**63 - 1, (2, b, q))
    row = (*words, torch.randint(0, 2**32, (b, q)), torch.randint(0, 65537, (b, q)))
    row = (*row, torch.rand(b, q) * 9)
    columns = torch.randint(0, int(random.choice([9, 5000, 2**23])), (b, k))
    columns = columns.sort().values if seed % 3 else columns
    assert torch.equal(
        library.attention(x, row, columns, 7), reference.attention(x, row, columns, 7)
    )
    group = int(random.choice([1, 1, 5, 10**6]))
    assert torch.equal(library.rows(x[:, 0], row, group), reference.rows(x[:, 0], row, group))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_masks_do_not_depend_on_threads(num_threads):
    library, before = compiled(), torch.get_num_threads()
    x, row = torch.randn(37, 3, 1000), [t.expand(37, 3) for t in row_tensors((37, 3))]
    torch.set_num_threads(num_threads)
    try:
        y = library.rows(x, tuple(row), 1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, reference.rows(x, tuple(row), 1))


def test_a_library_that_draws_other_masks_is_not_used(monkeypatch):
    library = compiled()
    wrong = lambda x, per_row, columns, head_offset: x * 2  # noqa: E731
    monkeypatch.setattr(library, "attention", wrong)
    assert "known answer" in cpu.self_test(library)


def draws(keys, ids, positions, features):
    t = threshold(0.1)
    x = torch.ones(len(ids), len(positions), features)
    row = (torch.tensor(keys), torch.tensor(ids)[:, None], torch.tensor(positions))
    return (kernels.rows(x, *row, torch.tensor(t), torch.tensor(1.0)) != 0).numpy()


def test_a_million_draws_keep_the_share_they_should(kernel):
    kept = draws(1, range(100), range(10), 1000)
    share, sigma = 1 - threshold(0.1) / 65536, (0.1 * 0.9 / kept.size) ** 0.5
    assert abs(kept.mean() - share) < 3 * sigma


@pytest.mark.parametrize("step", [(0, 0, 1), (0, 0, 8), (0, 1, 0), (1, 0, 0)])
def test_neighbouring_features_positions_and_samples_are_unrelated(kernel, step):
    kept = draws(1, range(100), range(10), 1000)
    first = kept[tuple(slice(None, -s or None) for s in step)].ravel()
    second = kept[tuple(slice(s, None) for s in step)].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 3.5 / first.size**0.5


def test_neighbouring_keys_are_unrelated(kernel):
    first, second = (draws(key, range(100), range(10), 1000).ravel() for key in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 3.5 / first.size**0.5
