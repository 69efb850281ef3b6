"""Confining NaN and infinity to the tokens from which on they belong to a memory.

Within a chunk, backends multiply what later tokens write by zero, and zero times infinity is NaN: one token that is not
finite, or whose gradient overflows, would reach the outputs before it. On a CPU, a result that is not finite is
therefore computed again in halves, and halves of halves, until a span begins with the token that made it so. Backends
for a GPU, which would have to be waited for, find the token themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import sum_is_finite
from .network_torch import torch_read
from .state import BackendFunction, MemoryState, Options, Tokens, where_rows


def confine_overflow(
    write: BackendFunction,
    tokens: Tokens,
    state: MemoryState,
    norm: Tensor | None,
    mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, MemoryState]:
    """``write``, whose outputs before a token are as if the token had not come.

    A row and head whose state is not finite when it is given is not looked into, nor is a query that is not finite,
    which affects its own output alone.
    """
    y, after = write(tokens, state, norm, mask, options)
    time = tokens.q.shape[1]
    if sum_is_finite(y, *_written(after, tokens)) or (time == 1 and options.read == "after"):
        return y, after
    found = _nonfinite(_written(after, tokens)) | ((~y.isfinite().all(-1)) & tokens.q.isfinite().all(-1)).any(1)
    if not bool((found & ~_nonfinite([*_written(state, tokens), *state.anchor])).any()):
        return y, after
    if time == 1:
        weights = state.weights
        if options.read == "anchor":
            weights = where_rows(state.position % options.chunk > 0, state.anchor, weights)
        y = torch_read(tokens.q, weights, options.activation, norm)
        return y if mask is None else y.masked_fill(~mask[..., None, None], 0.0), after
    cut = time // 2
    if time > options.chunk:  # between chunks, which leaves those before the token as they are
        cut -= (int(state.position[0]) + cut) % options.chunk
        cut += options.chunk if cut <= 0 else 0
    outputs = []
    for span in (slice(0, cut), slice(cut, time)):
        part = None if mask is None else mask[:, span]
        y, state = confine_overflow(write, tokens.at(span), state, norm, part, options)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _written(state: MemoryState, tokens: Tokens) -> tuple[Tensor, ...]:
    return state.weights if tokens.eta is None else (*state.weights, *state.momentum)


def _nonfinite(part: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """``[batch, heads]`` bool: a matrix of the row and head is not finite."""
    return torch.stack([~x.detach().isfinite().flatten(2).all(-1) for x in part]).any(0)
