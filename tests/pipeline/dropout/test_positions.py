"""Logical positions: the same for a token however its batch was padded, packed or cut."""

import pytest
import torch
from torch import nn

from pipeline.dropout.positions import StackInputs, fixes_positions, is_stack

CPU = torch.device("cpu")


class Stack(nn.Module):
    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, **others):
        pass


class Embedding(nn.Module):
    def forward(self, input_ids, position_ids=None):
        pass


class Cache:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def inputs(*masks: list[int], length: int | None = None, **others) -> StackInputs:
    mask = torch.tensor(masks) if masks else None
    ids = torch.zeros(len(masks) or 1, length or len(masks[0]), dtype=torch.long)
    found = StackInputs.of(Stack(), (ids,), {"attention_mask": mask, **others})
    assert found is not None
    return found


def test_a_stack_takes_tokens_and_their_mask():
    assert is_stack(Stack())
    assert not is_stack(Embedding())


def test_a_call_without_tokens_says_nothing():
    assert StackInputs.of(Stack(), (), {"attention_mask": torch.ones(1, 2)}) is None


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([1, 1, 1, 0], [0, 1, 2]),
        ([0, 0, 1, 1], [0, 1]),
        ([0, 1, 1, 0], [0, 1]),
    ],
)
def test_padding_moves_no_token(mask, expected):
    found = inputs(mask).queries(CPU)[0]
    assert found[torch.tensor(mask).bool()].tolist() == expected


def test_without_a_mask_tokens_are_counted():
    assert inputs(length=3).queries(CPU).tolist() == [[0, 1, 2]]


def test_given_positions_win():
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    found = inputs([1] * 5, position_ids=packed)
    assert found.queries(CPU).tolist() == packed.tolist()
    assert found.keys(5, CPU).tolist() == packed.tolist()


def test_a_mask_for_attention_itself_says_nothing_of_positions():
    found = inputs(length=3, attention_mask=torch.ones(1, 1, 3, 3))
    assert found.queries(CPU).tolist() == [[0, 1, 2]]


def test_cached_tokens_come_first():
    found = inputs([1, 1, 1, 1], [0, 0, 1, 1], length=1, cache=Cache(3))
    assert found.queries(CPU).tolist() == [[3], [1]]
    assert found.keys(4, CPU).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


def test_a_cache_without_mask_is_counted():
    assert inputs(length=2, cache=Cache(5)).queries(CPU).tolist() == [[5, 6]]


def test_a_sliding_window_has_let_go_of_the_oldest():
    found = inputs([0, 1, 1, 1, 1], length=1, cache=Cache(4))
    assert found.keys(3, CPU).tolist() == [[1, 2, 3]]


def test_a_static_cache_has_room_for_tokens_to_come():
    found = inputs([0, 1, 1], length=1, cache=Cache(2))
    assert found.keys(5, CPU).tolist() == [[0, 0, 1, 2, 3]]


def test_cross_attention_counts_the_tokens_of_the_encoder():
    mask = torch.tensor([[0, 1, 1]])
    found = inputs(length=2, encoder_attention_mask=mask)
    assert found.encoder_keys(3, CPU).tolist() == [[0, 0, 1]]


class Tower(nn.Module):
    def forward(self, pixel_values, output_hidden_states=None):
        return pixel_values


class Both(nn.Module):
    def forward(self, input_ids, pixel_values, attention_mask=None):
        return self.tower(pixel_values)


def test_an_encoder_of_images_counts_its_own_positions_inside_a_stack_of_text():
    tower, both = Tower(), Both()
    assert (is_stack(tower), fixes_positions(tower)) == (False, True)
    assert (is_stack(both), fixes_positions(both)) == (True, True)
    assert not fixes_positions(nn.Linear(2, 2))
    found = StackInputs.of(tower, (torch.zeros(2, 3, 8, 8),), {})
    assert (found.length, found.attention_mask) == (0, None)
