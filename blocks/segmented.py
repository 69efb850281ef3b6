"""What ``context`` asks of the blocks inside it, with defaults for blocks that define only the contract of a block.

A block may define ``every`` (outputs at some tokens only) and ``bound`` (it starts anew after so many tokens). The
neural memory is split into what waits for its state and what does not: the latter runs once for all segments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import Block, as_memory
from .layers import has_hooks
from .memory import NeuralMemory
from .state import State


def forward_every(
    block: Block, x: Tensor, state: State, *, step: int, mask: Tensor | None = None
) -> tuple[Tensor, State]:
    """``block(x, state, mask=mask)``, with the outputs at every ``step``-th token only, ``[batch, time / step, dim]``.

    ``time`` is a multiple of ``step``, and ``mask`` the same for all tokens of a step. ``block.every`` is used where it
    belongs to the block's ``forward``.
    """
    if step == 1:
        return block(x, state, mask=mask)
    kind: Any = type(block)
    if _has_every(kind) and runs_its_class(block, "forward"):
        return block.every(x, state, step=step, mask=mask)  # type: ignore[operator]
    y, state = block(x, state, mask=mask)
    return y[:, step - 1 :: step], state


@functools.cache
def _has_every(kind: Any) -> bool:
    """Whether the class that defines ``forward`` defines ``every`` too."""
    return "every" in vars(next(parent for parent in kind.__mro__ if "forward" in vars(parent)))


def runs_its_class(block: nn.Module, *methods: str) -> bool:
    """Whether calling the block runs what its class defines: no hooks, and none of ``methods`` replaced."""
    return not (has_hooks(block) or any(method in vars(block) for method in methods))


def limit_window(block: Block, tokens: int) -> None:
    """Tell ``block`` that it starts anew after at most ``tokens`` tokens, so that attention keeps no more of them."""
    bound: Any = getattr(block, "bound", None)
    if bound is not None:
        bound(tokens)
    for field in block.delegates:
        inner = getattr(block, field)
        for child in [inner] if isinstance(inner, Block) else inner:
            limit_window(child, tokens)


class Halves(NamedTuple):
    """``read(x, state)`` is ``recall(ask(x), state)``; ``forward`` is ``learn(x, state)``, then ``output(y, x)``."""

    ask: Callable[[Tensor], tuple[Tensor, ...]]
    """Needs no state. Each result is ``[batch, time, ...]``."""
    recall: Callable[[Sequence[Tensor], State], Tensor]
    learn: Callable[..., tuple[Tensor, State]]
    """Takes ``mask=`` too."""
    output: Callable[[Tensor, Tensor], Tensor]
    """Needs no state. Its results at masked tokens are not used."""


def halves(memory: Block, pieces: int) -> Halves:
    """Split the methods of ``memory`` for a sequence that is read in ``pieces``."""
    splits = pieces > 1 and type(memory) is NeuralMemory and not torch.compiler.is_compiling()
    if splits and isinstance(memory, NeuralMemory) and runs_its_class(memory, "forward", "read"):
        return Halves(memory.ask, memory.recall, memory.learn, memory.output_of)
    return Halves(lambda x: (x,), lambda asked, state: as_memory(memory).read(asked[0], state), memory, lambda y, x: y)
