"""The recurrence of self-modifying Titans: matrices that make the keys, values and gates that they are written with.

HOPE, arXiv 2512.24695, eq. 83-93; ``docs/learners.md`` has what is read differently from what is printed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..custom_op import OpaqueOperation
from ..dispatch import full_precision
from ..norm_gate import l2_norm
from ..padding import align
from .learner import learn_writes, make_rule
from .learner.state import Writes
from .state import MemoryState

KEY, VALUE, STEP, DECAY, MEMORY = range(5)
"""The learners of a head."""
DELTA = make_rule(network="linear", objective="l2_half", optimizer="step", chunk=1)
"""``W <- alpha W - eta (W k - v) k'``."""


class Matrices(NamedTuple):
    """The learners of all rows."""

    weights: Tensor
    """``[batch, 5, heads, width, width]``: the learners of keys, values, step sizes and decays, and the memory."""
    anchor: Tensor
    """The same at the start of the current chunk."""
    position: Tensor
    """``[batch]`` int64: tokens read so far by each row."""


def self_modify(
    q: Tensor, x: Tensor, state: Matrices, valid: Tensor | None, gates: Tensor, bias: Tensor, chunk: int,
    max_step: float,
) -> tuple[Tensor, Matrices]:  # fmt: skip
    """Outputs ``[batch, time, heads, width]`` and the matrices after the tokens, chunk by chunk.

    ``q, x``: ``[batch, time, heads, width]``; ``valid``: ``[batch, time]``; ``gates``: ``[2, heads, width]`` and
    ``bias``: ``[2, heads]``, from the responses of the learners to the step size and to what is kept.
    """
    given = (q, x, state, valid, gates, bias, chunk, max_step)
    with full_precision(x.device.type):
        found: tuple[Tensor, Matrices]
        # a compiler cannot trace values that decide about chunks
        found = OPERATOR.call("chunks", *given) if torch.compiler.is_compiling() else _chunks(*given)
        return found


def _chunks(
    q: Tensor, x: Tensor, state: Matrices, valid: Tensor | None, gates: Tensor, bias: Tensor, chunk: int,
    max_step: float,
) -> tuple[Tensor, Matrices]:  # fmt: skip
    rows, time = x.shape[:2]
    phases = (state.position % chunk).tolist()
    layout = None
    first = chunk - phases[0] if rows else 1
    if valid is not None or len(set(phases)) > 1:  # the chunks of all rows begin at the same places
        valid = torch.ones(rows, time, dtype=torch.bool, device=x.device) if valid is None else valid
        layout = align(valid, state.position % chunk)
        q, x, valid, first = layout.spread(q), layout.spread(x), layout.filled, chunk
    outputs = []
    edges = [0, *range(first, x.shape[1], chunk), x.shape[1]]
    for start, stop in pairwise(edges):
        span = slice(start, stop)
        outputs.append(apply(state.anchor[:, MEMORY], q[:, span]))
        if stop > start:
            real = None if valid is None else valid[:, span]
            state = _write_chunk(x[:, span], state, real, gates, bias, chunk, max_step)
    y = torch.cat(outputs, 1)
    return y if layout is None else layout.collect(y), state


def _write_chunk(
    x: Tensor, state: Matrices, valid: Tensor | None, gates: Tensor, bias: Tensor, chunk: int,
    max_step: float,
) -> Matrices:  # fmt: skip
    anchor = state.anchor
    x = x.to(anchor.dtype)
    k, v = l2_norm(apply(anchor[:, KEY], x)), apply(anchor[:, VALUE], x)
    step, keep = (
        torch.sigmoid((apply(anchor[:, i], x) * rate).sum(-1) + offset)
        for i, rate, offset in zip((STEP, DECAY), gates, bias)
    )
    # of all learners side by side, as heads
    each = l2_norm(apply(anchor, v)) - apply(anchor, k)
    same = lambda y: torch.cat([y] * 5, 2)  # noqa: E731
    k, theta, alpha = same(k), same(max_step * step), same(1 - keep)
    writes = Writes(k, k, each.flatten(2, 3), theta, None, alpha, None, None)
    before = (state.weights.flatten(1, 2),)
    _, after = learn_writes(DELTA, writes, MemoryState(before, (), before, state.position), None, valid)
    weights = after.weights[0].view_as(anchor)
    ends = (after.position % chunk == 0) & (after.position > state.position)
    anchor = torch.where(ends.view(-1, 1, 1, 1, 1), weights, anchor)
    return Matrices(weights, anchor, after.position)


def apply(weights: Tensor, x: Tensor) -> Tensor:
    """``[batch, .., heads, out, in]`` of ``[batch, time, heads, in]``: ``[batch, time, .., heads, out]``."""
    if weights.dim() == 4:
        return torch.einsum("bhoi,bthi->btho", weights, x.to(weights.dtype))
    return torch.einsum("blhoi,bthi->btlho", weights, x)


OPERATOR = OpaqueOperation(
    "self_modifying", {"chunks": _chunks}, lambda q, x, state, *others: (q.to(state.anchor.dtype), state), [Matrices]
)
