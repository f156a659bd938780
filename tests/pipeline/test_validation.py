"""Every rank coordinate of the validation, in one process."""

import pytest
import torch
from torch import nn

from pipeline.validation import evaluating, share


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 33])
def test_each_row_is_counted_once_and_every_process_runs_as_many_batches(num_rows, world_size):
    shares = [share(num_rows, rank, world_size, batch_size=4) for rank in range(world_size)]
    counted = sorted(row for rows, _ in shares for row in rows)
    assert counted == list(range(num_rows))
    assert len({-(-len(rows) // 4) + num_idle for rows, num_idle in shares}) == 1


def test_a_module_frozen_in_evaluation_mode_stays_frozen():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
        torch.testing.assert_close(model[0](torch.ones(2)), torch.ones(2))
    assert [module.training for module in model.modules()] == [True, True, False]
