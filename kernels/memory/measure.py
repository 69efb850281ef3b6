"""Measuring how surprising each token is when a memory is written."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import full_precision
from .operation import check_memory, run_memory
from .state import MemoryState, Options, Tokens
from .surprise import ChunkWalk, surprise_at


class Measured(NamedTuple):
    """What :func:`measure_memory` returns for every token, ``[batch, time, heads]`` each."""

    surprise: Tensor
    """The norm of its gradient at its anchor, before any clipping; float32 or wider."""
    error: Tensor
    """``|M(k) - v|^2`` there."""
    suppressed: Tensor
    """Bool: the surprise is below the threshold, and the token is not written."""


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
    """Measure the surprise of each token when :func:`titans_memory` writes the sequence.

    The arguments are those of :func:`titans_memory`, grouped: ``(Tokens, state, norm, mask, Options)``.

    The sequence is written once more, chunk by chunk, which takes several times as long as writing it at once. Values
    at masked tokens are arbitrary. ``written=False``: nothing is written, and every token is measured at the weights of
    the state.
    """
    check_memory(tokens._replace(q=tokens.k), state, norm, mask, options)
    compute = torch.promote_types(tokens.k.dtype, state.weights[0].dtype)
    tokens = tokens._replace(q=tokens.k).map(lambda x: x.to(compute))
    state, norm = state.to(compute), None if norm is None else norm.to(compute)
    with full_precision(tokens.k.device.type):
        if not written or tokens.k.shape[1] == 0:
            found = surprise_at(
                tokens.k, tokens.v, state.weights, options.activation, norm, options.objective, tokens.delta
            )
            return Measured(*found, torch.zeros_like(found.norm, dtype=torch.bool))
        walk = ChunkWalk(tokens, state, norm, mask, options, run_memory)
        parts = [(*part.surprise, part.suppressed) for part in walk.parts(last=False)]
        return Measured(*(walk.collect(list(each)) for each in zip(*parts)))
