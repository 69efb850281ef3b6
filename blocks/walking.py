"""Walking: reading and writing a memory piece by piece along a sequence of which every piece but one is still ahead.

What a memory makes of each token on its own waits for no state: it is done once, for all pieces. A memory's ``walk``
is its ``read`` and its ``forward`` in halves, and stands for them only where calling those would run them and nothing
else, as in ``decoding``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .block import Block, as_memory
from .decoding import own
from .state import State


class Learn(Protocol):
    def __call__(self, x: Tensor, state: State, *, mask: Tensor | None = None) -> tuple[Tensor, State]: ...


class Walk(NamedTuple):
    """``read(x, state)`` is ``answer(ask(x), state)``; with ``raw, state = learn(x, state)``, ``forward(x, state)`` is
    ``finish(raw, x), state``."""

    ask: Callable[[Tensor], tuple[Tensor, ...]]
    """Looks at each token on its own. ``[batch, time, ..]`` each."""
    answer: Callable[[Sequence[Tensor], State], Tensor]
    learn: Learn
    finish: Callable[[Tensor, Tensor], Tensor]
    """Looks at each token on its own; what it gives at masked tokens counts for nothing."""


def walk(memory: Block, pieces: int) -> Walk:
    """The halves, or the whole of each with nothing beside it."""
    of = None
    if pieces > 1 and not torch.compiler.is_compiling():
        of = own(memory, "walk", "forward", "read", "__call__")
    if of is not None:
        return of()
    return Walk(
        lambda x: (x,), lambda asked, state: as_memory(memory).read(asked[0], state), memory, lambda raw, x: raw
    )
