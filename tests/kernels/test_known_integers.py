"""Integers that the host knows of tensors on an accelerator, which is not asked for them."""

import pytest
import torch

from titans_build.blocks.block import as_rows
from titans_build.blocks.state import detach
from titans_build.kernels.dispatch import advanced, integers, known


@pytest.fixture
def position():
    """A tensor whose values cannot be read."""
    return torch.zeros(2, dtype=torch.int64, device="meta")


def test_what_is_known_is_not_read(position):
    with pytest.raises(NotImplementedError):
        integers(position)
    after = advanced(known(position, [3, 5]), 4)
    assert integers(after) == [7, 9] and integers(position) == [3, 5]
    assert integers(advanced(after, 4, most=12)) == [11, 12]


def test_nothing_is_known_of_another_tensor(position):
    known(position, [3, 5])
    with pytest.raises(NotImplementedError):
        integers(advanced(position.clone(), 4))


def test_states_that_are_detached_or_expanded_are_known(position):
    state = detach((known(position, [3, 5]), torch.zeros(2, 1, device="meta")))
    assert integers(state[0]) == [3, 5]
    (one,) = as_rows((known(position[:1], [3]),), 4)
    assert one.shape == (4,) and integers(one) == [3] * 4


def test_values_are_read_on_a_cpu():
    position = known(torch.tensor([1, 2]), [3, 5])
    assert integers(position) == [1, 2] and integers(advanced(position, 1)) == [2, 3]
