"""What memories have read last, from which their states after any of these tokens can be had again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...blocks.observers import suppressed
from ...blocks.state import State
from .adapter import SwapError

REACH = 256
"""The inputs of longer calls are not kept, but for as many tokens at their end."""


class Replay(NamedTuple):
    """What one memory has read since a state."""

    run: Callable[[Tensor, State, Tensor | None], State] | None
    """``run(x, state, mask)`` returns the state after ``x`` [rows, time, ...]."""
    before: State
    x: tuple[Tensor, ...]
    """The inputs of each call since; empty if they were not kept."""
    mask: tuple[Tensor | None, ...]

    def after(self, count: int) -> State:
        """The state after ``count`` tokens. Raises ``SwapError`` if it is not known."""
        if self.run is None or (count and not self.x):
            raise SwapError(
                f"only the last {REACH} tokens of a call can be removed, or all of it, and no tokens that were read "
                "with gradients, or of which a memory has read others than the model"
            )
        if count == 0:
            return self.before
        first = self.first(count)
        with suppressed():  # observers have seen these tokens
            return self.run(first.x[0], self.before, first.mask[0])

    def first(self, count: int) -> Replay:
        """The first ``count`` tokens of it."""
        if not self.x:
            return self
        x, mask = torch.cat(self.x, dim=1)[:, :count], None
        if any(mask is not None for mask in self.mask):
            real = (x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for x, m in zip(self.x, self.mask))
            mask = torch.cat(list(real), dim=1)[:, :count]
        return self._replace(x=(x,), mask=(mask,))

    def then(self, other: Replay) -> Replay:
        """This, followed by ``other``."""
        return self._replace(x=self.x + other.x, mask=self.mask + other.mask)


UNKNOWN = Replay(None, None, (), ())


class Record(NamedTuple):
    """Tokens that were read, and what each memory has read of them, by its name."""

    tokens: int
    replays: Mapping[str, Replay]
