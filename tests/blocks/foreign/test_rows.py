"""Rows of different lengths, run by something that knows of no padding."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_build.blocks.foreign.rows import by_kind, by_length


class Summing:
    """Running sums, and a record of the shapes that it was called with."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.shapes.append((x.shape[0], x.shape[1]))
        y = state.unsqueeze(1) + x.cumsum(dim=1)
        return y, y[:, -1]


def test_rows_of_one_length_go_together_and_none_sees_what_lies_behind_it() -> None:
    x, state, run = torch.randn(5, 6, 3), torch.randn(5, 3), Summing()
    lengths = [4, 0, 6, 4, 1]
    y, after = by_length(run, x, state, lengths)
    assert sorted(run.shapes) == [(1, 1), (1, 6), (2, 4)]
    for row, length in enumerate(lengths):
        expected = state[row] + x[row, :length].cumsum(dim=0)
        torch.testing.assert_close(y[row, :length], expected)
        assert not y[row, length:].any()
        torch.testing.assert_close(after[row], expected[-1] if length else state[row])


def test_rows_of_one_length_alone_are_one_call_on_what_was_given() -> None:
    x, state, run = torch.randn(2, 6, 3), torch.randn(2, 3), Summing()
    y, _ = by_length(run, x, state, [6, 6])
    assert run.shapes == [(2, 6)] and y.shape == x.shape


def test_gradients_find_their_rows() -> None:
    x, state = torch.randn(3, 4, 2, requires_grad=True), torch.zeros(3, 2)
    y, _ = by_length(Summing(), x, state, [2, 4, 2])
    y[2].sum().backward()
    assert x.grad is not None
    assert x.grad[2, :2].all() and not x.grad[:2].any() and not x.grad[2, 2:].any()


def test_the_kind_is_told() -> None:
    x, state = torch.ones(4, 1, 1), torch.zeros(4, 1)
    y, _ = by_kind(lambda x, state, kind: (x * kind, state), x, state, [7, 2, 7, 5])
    assert y.flatten().tolist() == [7, 2, 7, 5]
