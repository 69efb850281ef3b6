"""What a memory's tokens do to it: the surprise of each at the weights its gradient is taken at, along a sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import full_precision
from .operation import titans_memory
from .state import MemoryState
from .surprise import surprise_at
from .threshold import Walk
from .tokens import Options, Tokens


class Measured(NamedTuple):
    """Of every token, ``[batch, time, heads]`` each."""

    surprise: Tensor
    """The norm of its gradient at its anchor, before any clipping; float32 or wider."""
    error: Tensor
    """``|M(k) - v|^2`` there."""
    held: Tensor
    """Bool: the threshold holds it back."""


@torch.no_grad()
def measure_memory(
    tokens: Tokens,
    state: MemoryState,
    norm: Tensor | None,
    mask: Tensor | None,
    options: Options,
    *,
    written: bool = True,
) -> Measured:
    """What ``titans_memory`` makes of ``tokens``, measured on the way; arguments as there. Masked tokens: anything.

    The sequence is written once more, chunk by chunk, which costs several times what writing it at once does.
    ``written=False``: nothing is, and every token is measured at the weights of the state.
    """
    wide = torch.promote_types(tokens.k.dtype, state.weights[0].dtype)
    tokens = tokens.map(lambda x: x.to(wide))._replace(q=tokens.k.to(wide))
    weights, momentum, anchor = (tuple(x.to(wide) for x in part) for part in state[:3])
    state = MemoryState(weights, momentum, anchor, state.position)
    norm = None if norm is None else norm.to(wide)
    with full_precision(tokens.k.device.type):
        if not written:
            once = surprise_at(tokens.k, tokens.v, state.weights, options.activation, norm)
            return Measured(*once, torch.zeros_like(once.norm, dtype=torch.bool))
        if tokens.k.shape[1] == 0:
            nothing = tokens.theta.new_empty(tokens.theta.shape)
            return Measured(nothing, nothing, nothing > 0)
        walk = Walk(tokens, state, norm, mask, options, _operation)
        found = [(*step.surprise, step.held) for step in walk.steps(ends=False)]
        return Measured(*(walk.collect(list(parts)) for parts in zip(*found)))


def _operation(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    return titans_memory(
        *tokens, state, options.chunk, options.activation, norm, mask, clip=options.clip, read=options.read
    )
