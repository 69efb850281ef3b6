"""Running a module on rows of different lengths that knows of no padding: rows of one kind go together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..state import State, concatenate, select

Run: TypeAlias = Callable[[Tensor, State], tuple[Tensor, State]]


def by_length(run: Run, x: Tensor, state: State, lengths: Sequence[int]) -> tuple[Tensor, State]:
    """``run`` on the first ``lengths[b]`` tokens of each row of ``x`` [batch, time, dim]; zeros behind them.

    Rows of one length are run together and see no other token, so that what comes of them is what ``run`` makes of
    the rows without their padding, whatever it is. Rows of no token keep their state.
    """

    def several(x: Tensor, state: State, length: int) -> tuple[Tensor, State]:
        if length == 0:
            return torch.zeros_like(x), state
        y, state = run(x[:, :length], state)
        return F.pad(y, (0, 0, 0, x.shape[1] - length)), state

    return by_kind(several, x, state, lengths)


def by_kind(
    run: Callable[[Tensor, State, int], tuple[Tensor, State]], x: Tensor, state: State, kinds: Sequence[int]
) -> tuple[Tensor, State]:
    """``run(x, state, kind)`` on the rows of each kind, and all rows again in their order."""
    if len(set(kinds)) == 1:
        return run(x, state, kinds[0])
    places: dict[Hashable, list[int]] = {}
    for row, kind in enumerate(kinds):
        places.setdefault(kind, []).append(row)
    parts = [run(x[rows], select(state, rows), kinds[rows[0]]) for rows in places.values()]
    order = torch.tensor([row for rows in places.values() for row in rows], device=x.device).argsort()
    states = concatenate([after for _, after in parts])
    return torch.cat([y for y, _ in parts]).index_select(0, order), select(states, order)
