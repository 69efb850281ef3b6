"""The one-token kernels for many tokens in a row, each in the place of the one before it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import can_prepare as prepares
from .operation import MEMORY
from .read import READING
from .step_cpu import Read, Step
from .tokens import Options, Tokens


def prepare_step(
    tokens: Tokens, shapes: Sequence[tuple[int, int]], norm: Tensor | None, options: Options
) -> Step | None:
    """``titans_memory`` of one token of each row, which lies in ``tokens`` each time; ``None``: gains nothing.

    A function of the state, with networks of layers of ``shapes`` ``(out, in)``; ``y`` is written over by the next
    call. Without gradients, states in the dtype of the tokens.
    """
    if prepares(*tokens, norm):
        run = MEMORY.choose(
            device="cpu", dtype=tokens.q.dtype, time=1, chunk=options.chunk, layers=len(shapes), plain=True, grad=False
        )
        if run is MEMORY.backends["native_step"].run:
            return Step(tokens, shapes, norm, options)
    return None


def prepare_read(q: Tensor, shapes: Sequence[tuple[int, int]], activation: str, norm: Tensor | None) -> Read | None:
    """``read_memory`` of one query of each row likewise: a function of the weights."""
    if prepares(q, norm):
        run = READING.choose(device="cpu", dtype=q.dtype, time=1, layers=len(shapes), plain=True, grad=False)
        if run is READING.backends["native_step"].run:
            return Read(q, shapes, activation, norm)
    return None
