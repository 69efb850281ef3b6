"""The memory for one token of each row at a time: what does not change between tokens is prepared once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import can_prepare
from . import MEMORY, READ
from .state import Options, Tokens
from .step_cpu import ReadPlan, StepPlan


def prepare_step(
    tokens: Tokens, shapes: Sequence[tuple[int, int]], norm: Tensor | None, options: Options
) -> StepPlan | None:
    """Prepare repeated one-token calls of :func:`titans_memory`.

    The caller writes each new token into the same tensors ``tokens``.

    Returns a function of the state (layers of ``shapes`` ``(out, in)``, dtype of the tokens, no gradients), whose ``y``
    is overwritten by the next call; or ``None`` where a plan would save nothing.
    """
    if can_prepare(*tokens, norm):
        run = MEMORY.choose(
            device="cpu", dtype=tokens.q.dtype, time=1, chunk=options.chunk, layers=len(shapes), plain=True, grad=False,
        )  # fmt: skip
        if run is MEMORY.backends["native_step"].run:
            return StepPlan(tokens, shapes, norm, options)
    return None


def prepare_read(q: Tensor, shapes: Sequence[tuple[int, int]], activation: str, norm: Tensor | None) -> ReadPlan | None:
    """Prepare repeated calls of :func:`read_memory` with one query per row.

    The caller writes each new query into the same tensor ``q``. Returns a function of the weights, whose result is
    overwritten by the next call; or ``None`` where a plan would save nothing.
    """
    if can_prepare(q, norm):
        run = READ.choose(device="cpu", dtype=q.dtype, time=1, layers=len(shapes), plain=True, grad=False)
        if run is READ.backends["native_step"].run:
            return ReadPlan(q, shapes, activation, norm)
    return None
