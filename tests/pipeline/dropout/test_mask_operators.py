"""Masks in compiled graphs: whole, never compiled again, and what eager code draws."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pipeline.dropout.kernels import keyed_attention, keyed_rows
from pipeline.dropout.philox import scale, threshold

T = threshold(0.2)


class KeyedLinear(nn.Linear):
    """A layer and its dropout, keys and ids as tensors."""

    def forward(self, x, keys, ids):
        x = super().forward(x)
        rows = (keys[:, None], ids[:, None], torch.arange(x.shape[1]))
        return keyed_rows(x, *rows, torch.tensor(T), torch.tensor(scale(T)))


class Stack(nn.Module):
    """Two layers with attention between them; every site has a key of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = KeyedLinear(24, 24), KeyedLinear(24, 16)

    def forward(self, x, keys, ids):
        x = torch.relu(self.first(x, keys[0], ids))
        positions = torch.arange(x.shape[1])
        rows = (keys[1][:, None], ids[:, None], positions, positions)
        scores = torch.softmax(x @ x.transpose(1, 2), -1)[:, None]
        scores = keyed_attention(scores, *rows, torch.tensor(T), torch.tensor(scale(T)))
        return self.last(scores[:, 0] @ x, keys[2], ids)


def outputs_and_gradients(forward, model, *args):
    model.zero_grad()
    y = forward(*args)
    y.square().sum().backward()
    return [y, *(parameter.grad for parameter in model.parameters())]


@pytest.fixture
def compiled_anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_a_compiled_stack_equals_the_eager_one_and_is_compiled_once(compiled_anew):
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(3, 5, 24)
    # inductor agrees too, but needs a C++ compiler and a quarter of a minute
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = []
    for step in range(3):
        keys, ids = torch.tensor([[1], [2], [3]]) * 7**20 + step, torch.arange(3) + 100 * step
        ours = outputs_and_gradients(compiled, model, x, keys, ids)
        expected = outputs_and_gradients(model, model, x, keys, ids)
        torch.testing.assert_close(ours, expected)
        seen.append(ours[0] != 0)
    assert not seen[0].equal(seen[1])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]


def test_the_operators_keep_torchs_rules():
    x = torch.randn(2, 3, 5, requires_grad=True)
    row = (torch.tensor([[1], [2]]).expand(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    row = (*row, torch.arange(3).expand(2, 3), torch.full((2, 3), T), torch.ones(2, 3))
    torch.library.opcheck(torch.ops.masklock.rows.default, (x, *row, 1))
    columns = torch.arange(5).expand(2, 5)
    scores = torch.rand(2, 4, 3, 5, requires_grad=True)
    arguments = (scores, *row[:3], columns, *row[3:], 0)
    torch.library.opcheck(torch.ops.masklock.attention.default, arguments)
