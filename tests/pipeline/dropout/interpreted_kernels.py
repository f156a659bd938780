"""The Triton kernel, interpreted on the CPU, against the reference and the kernel that is active.

test_gpu_kernels.py runs this file with TRITON_INTERPRET=1: that must be set before Triton is there.
The interpreter cuts bfloat16 where a GPU rounds: there masks are compared exactly, values nearly.
"""

import pytest
import torch

from pipeline.dropout import kernels
from pipeline.dropout.kernels import reference
from pipeline.dropout.kernels.gpu import TritonMasks
from pipeline.dropout.kernels.self_test import self_test

KERNEL = TritonMasks()
EXACT = [torch.float32, torch.float16, torch.float64]
DTYPES = [*EXACT, torch.bfloat16]


def random_row(samples, length):
    words = torch.randint(-(2**63), 2**63 - 1, (2, samples, length))
    positions = torch.randint(0, 2**32, (samples, length))
    thresholds = torch.randint(0, 65537, (samples, length), dtype=torch.int32)
    return (*words, positions, thresholds, torch.rand(samples, length) * 9)


def shared_row(samples, length, threshold=20000):
    """Stride 0 wherever a value is shared."""
    ids, positions = torch.arange(samples)[:, None] - 5, torch.arange(length)
    row = (torch.tensor(-(7**20)), ids, positions, torch.tensor(threshold), torch.tensor(1.3))
    return tuple(t.expand(samples, length) for t in row)


def check(y, expected):
    assert torch.equal(y != 0, expected != 0)
    exact = y.dtype in EXACT
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 2**-7, "atol": 1e-30}
    torch.testing.assert_close(y, expected, equal_nan=True, **tolerance)


def check_rows(x, row, group=1):
    y = KERNEL.rows(x, row, group)
    check(y, reference.rows(x, row, group))
    check(y, kernels.active("cpu").rows(x, row, group))


def check_attention(x, row, columns, head_offset=0):
    y = KERNEL.attention(x, row, columns, head_offset)
    check(y, reference.attention(x, row, columns, head_offset))
    check(y, kernels.active("cpu").attention(x, row, columns, head_offset))


def test_the_known_answers_are_drawn():
    assert self_test(KERNEL, "cpu", EXACT) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 29), (3, 1, 1), (1, 3, 2050), (2, 3, 768)], ids=str)
def test_rows_have_the_same_bits(dtype, shape):
    x = torch.randn(shape).to(dtype)
    check_rows(x, random_row(*shape[:2]))


@pytest.mark.parametrize("group", [2, 3, 4, 8, 12, 16, 40, 1000])
def test_groups_share_their_lanes(group):
    check_rows(torch.randn(2, 3, 75), shared_row(2, 3), group)


def test_a_channel_mask_is_shared_by_all_positions():
    keys, ids, positions, *rest = shared_row(2, 3)
    check_rows(torch.randn(2, 3, 20), (keys, ids, torch.full_like(positions, 2**32 - 1), *rest))


ARANGE = torch.arange(37).expand(2, 37)
COLUMNS = {
    "from 0": ARANGE,
    "at the limit": ARANGE + 2**23 - 37,
    "left padding": (ARANGE - torch.tensor([[3], [20]])).clamp(min=0),
    "right padding": torch.minimum(ARANGE, torch.tensor([[30], [11]])),
    "packed": ARANGE % torch.tensor([[13], [5]]),
    "anywhere": torch.randint(0, 2**23, (2, 37)),
    "shared, every other": torch.arange(74)[::2].expand(2, 37),
}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS.keys())
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.drill)], ids=str
)
def test_attention_has_the_same_bits(dtype, columns):
    x = torch.rand(2, 2, 3, 37).to(dtype)
    check_attention(x, random_row(2, 3), columns, head_offset=4094)


SPREADS = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns outside": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every other": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "one sample": lambda x: x[:1].expand(x.shape),
    "one value": lambda x: x[:, :, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
def test_values_may_lie_anywhere_in_memory(spread):
    x = spread(torch.randn(2, 2, 5, 37))
    before = x.clone()
    check_attention(x, shared_row(2, 5), ARANGE)
    check_rows(x[:, 0], shared_row(2, 5))
    assert torch.equal(x, before)


def test_offsets_go_beyond_2_to_the_31():
    values = torch.empty(2**31 + 100, dtype=torch.float16)  # only what is written is ever mapped
    x = values.as_strided((2, 2, 16), (2**31, 32, 1))
    x.copy_(torch.randn(2, 2, 16))
    check_rows(x, shared_row(2, 2))


def test_dropped_values_are_zero_even_where_they_were_no_numbers():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0]).repeat(2, 3, 5)
    check_rows(x, shared_row(2, 3))
    dropped = KERNEL.rows(x, shared_row(2, 3, threshold=65536), 1)
    assert torch.equal(dropped, torch.zeros_like(x))
    assert not torch.signbit(dropped).any()


@pytest.mark.parametrize(("name", "value"), [(2, -1), (2, 2**32), (3, -1), (3, 65537)])
def test_a_row_that_means_nothing_is_no_number(name, value):
    row = [t.clone() for t in shared_row(2, 3)]
    row[name][1, 1] = value
    y = KERNEL.rows(torch.ones(2, 3, 12), tuple(row), 1)
    wrong = torch.zeros(2, 3, dtype=torch.bool)
    wrong[1, 1] = True
    assert torch.equal(y.isnan(), wrong[:, :, None].expand(2, 3, 12))


@pytest.mark.parametrize("position", [-1, 2**23, 2**40])
def test_a_key_position_that_means_nothing_is_no_number(position):
    columns = ARANGE.clone()
    columns[1, 9] = position
    y = KERNEL.attention(torch.ones(2, 1, 3, 37), shared_row(2, 3), columns, 0)
    assert y[1, :, :, 9].isnan().all()
    assert not y[0].isnan().any()
    assert y.isnan().sum() == 3


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0)], ids=str)
def test_empty_tensors_stay_empty(shape):
    assert KERNEL.rows(torch.ones(shape), shared_row(*shape[:2]), 1).shape == shape


@pytest.mark.parametrize("group", [1, 3])
def test_features_of_a_slice_are_key_positions_of_head_0(group):
    x, row = torch.randn(2, 5, 61), random_row(2, 5)
    places = (torch.arange(13, 42) // group)[None].expand(2, -1)
    part = KERNEL.attention(x[:, None, :, 13:42], row, places, 0)[:, 0]
    check(part, reference.rows(x, row, group)[..., 13:42])
