"""The one-token kernels for many tokens in a row, each in the place of the one before it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..native.kernel import prepares
from .native_token import Read, Step, native_read, native_step
from .operation import MEMORY
from .reading import READING


def prepare_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    shapes: Sequence[tuple[int, int]],
    *,
    chunk: int,
    activation: str,
    norm: Tensor | None,
    clip: float | None,
    read: str,
) -> Step | None:
    """``titans_memory`` of one token of each row, which lies in ``q`` to ``alpha`` each time; ``None``: gains nothing.

    A function of the state, with networks of layers of ``shapes`` ``(out, in)``; ``y`` is written over by the next
    call. Without gradients, states in the dtype of ``q``.
    """
    if prepares(q, k, v, theta, eta, alpha, norm):
        run = MEMORY.choose(
            device="cpu", dtype=q.dtype, time=1, chunk=chunk, layers=len(shapes), plain=True, grad=False
        )
        if run is native_step:
            return Step(
                q, k, v, theta, eta, alpha, shapes, chunk=chunk, activation=activation, norm=norm, clip=clip, read=read
            )
    return None


def prepare_read(q: Tensor, shapes: Sequence[tuple[int, int]], activation: str, norm: Tensor | None) -> Read | None:
    """``read_memory`` of one query of each row likewise: a function of the weights."""
    if prepares(q, norm):
        run = READING.choose(device="cpu", dtype=q.dtype, time=1, layers=len(shapes), plain=True, grad=False)
        if run is native_read:
            return Read(q, shapes, activation, norm)
    return None
