"""A sequence of any length, phase and mask, chunk by chunk."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dispatch import full_precision, shows_values, sum_is_finite
from ...padding import Layout, align
from ..state import MemoryState
from . import chunks
from .coefficients import window_weights
from .rule import Rule
from .state import LearnerState, Writes, where

SOLVED_TOGETHER = 64
"""Chunks of one write whose errors are found together."""


class Measured(NamedTuple):
    """Of every write, ``[batch, time, heads]`` each."""

    surprise: Tensor
    """The norm of its gradient at its anchor, before any clipping."""
    error: Tensor
    """``|M(k) - v|^2`` there."""
    suppressed: Tensor
    """Bool: the surprise is below the threshold."""


@torch.no_grad()
def measure(
    rule: Rule, writes: Writes, state: MemoryState | LearnerState, norm: Tensor | None, mask: Tensor | None
) -> Measured:
    """Write the sequence once more, and measure how surprising each write is."""
    compute = state.weights[0].dtype
    writes, gain = writes.map(lambda x: x.to(compute)), None if norm is None else norm.to(compute).unsqueeze(1)
    parts: list[Measured] = []
    with full_precision(writes.k.device.type):
        _, _, layout = _spans(rule, writes, complete(rule, state, writes), gain, mask, parts)
    joined = (torch.cat([x.transpose(1, 2) for x in part], 1) for part in zip(*parts))
    return Measured(*(x if layout is None else layout.collect(x) for x in joined))


def run(
    rule: Rule, writes: Writes, state: LearnerState, gain: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, LearnerState]:
    """Outputs ``[batch, time, heads, d_out]`` and the state after the last write.

    ``state.position`` counts writes here. NaN and infinity reach no output before their token: where a result is not
    finite, it is computed again in halves, but not under ``vmap``, which hides values.
    """
    y, after, layout = _spans(rule, writes, state, gain, mask, None)
    y = y if layout is None else layout.collect(y)
    time = y.shape[1]
    if time < (1 if rule.read == "before" else 2) or not shows_values(y) or sum_is_finite(y, *after.weights):
        return y, after
    if not sum_is_finite(*state.weights, *state.anchor):
        return y, after
    if time == 1:  # which is read at weights that are finite
        y = read(rule, writes.q, state._replace(projection=after.projection), None if gain is None else gain[:, 0])
        return y if mask is None else y.masked_fill(~mask[..., None, None], 0.0), after
    outputs = []
    for span in (slice(0, time // 2), slice(time // 2, time)):
        part = None if mask is None else mask[:, span]
        y, state = run(rule, writes.map(lambda x, span=span: x[:, span]), state, gain, part)  # type: ignore[misc]
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _spans(
    rule: Rule, writes: Writes, state: LearnerState, gain: Tensor | None, mask: Tensor | None,
    measured: list[Measured] | None,
) -> tuple[Tensor, LearnerState, Layout | None]:  # fmt: skip
    """Outputs in the places of the layout, the state, and the layout. ``measured``: where to put measurements."""
    time, valid, layout = writes.theta.shape[1], None, None
    # with chunks of one write, a stretch may begin and end anywhere
    solves = rule.solves and len(state.weights) == 1 and gain is None and measured is None
    chunk = SOLVED_TOGETHER if solves else rule.chunk
    phases = [0 if solves else position % chunk for position in state.position.tolist()]
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is None and len(set(phases)) <= 1:
        edges = [0, *range(chunk - phases[0], time, chunk), time] if phases else []
    else:
        if mask is None:
            mask = torch.ones(writes.theta.shape[:2], dtype=torch.bool, device=writes.theta.device)
        offset = torch.zeros_like(state.position) if solves else state.position % chunk
        layout = align(mask, offset)
        if layout.filled.shape[1] > chunk:
            layout = align(mask, offset, multiple=chunk)
        eta = None if writes.eta is None else layout.spread(writes.eta, empty=1.0)
        writes = writes.map(layout.spread)._replace(eta=eta)
        valid, slots = layout.filled, layout.filled.shape[1]
        edges = [*range(0, slots, chunk), slots]
    if not (rule.sums or rule.moves_once) and rule.retention.linear:  # the weights after each token are made
        piece = chunks.tokens_made_together(*state.weights)
        edges = sorted({*edges, *(cut for a, b in pairwise(edges) for cut in range(a, b, piece))})
    outputs = []
    for start, stop in pairwise(edges):
        if start == stop:
            continue
        span = writes.map(lambda x, start=start, stop=stop: x[:, start:stop].transpose(1, 2))  # type: ignore[misc]
        y, state = _span(rule, span, state, gain, None if valid is None else valid[:, start:stop], solves, measured)
        outputs.append(y.transpose(1, 2))
    if not outputs:
        return writes.v.new_zeros(len(phases), time, *writes.v.shape[2:]), state, None
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state, layout


def _span(
    rule: Rule, writes: Writes, state: LearnerState, gain: Tensor | None, valid: Tensor | None, solves: bool,
    measured: list[Measured] | None,
) -> tuple[Tensor, LearnerState]:  # fmt: skip
    """A chunk or a part of one; with ``solves``, any number of chunks of one write."""
    time = writes.theta.shape[2]
    begins: Tensor | bool
    ends: Tensor | bool
    if valid is None:
        phase = int(state.position[0]) % rule.chunk
        after = state.position + time
        begins, ends = solves or phase == 0, solves or (phase + time) % rule.chunk == 0
    else:
        count = valid.sum(1)
        after = state.position + count
        begins = (state.position % rule.chunk == 0) & (count > 0)
        ends = (after % rule.chunk == 0) & (count > 0)
    state = state._replace(anchor=where(begins, state.weights, state.anchor))
    if rule.query is not None:
        assert state.projection is not None
        q, projection = chunks.project_queries(writes.q, writes.k, state.projection, valid)
        writes, state = writes._replace(q=q), state._replace(projection=projection)

    recent, held, every = None, None, writes
    if rule.window > 1:
        recent, held, every, state = take_window(rule, writes, state, valid)
    if solves:
        y, state = chunks.solved_sums(rule, writes, valid, state)
        return y, state._replace(anchor=where(ends, state.weights, state.anchor), position=after)
    at = chunks.anchor_weights(rule, writes, state)
    found = chunks.gradients(rule, at, every, gain)
    if measured is not None:
        now = chunks.Gradients(*([x[:, :, -time:] for x in part] for part in found))
        surprise, error = now.square().sqrt(), chunks.read_at(rule, at, writes.k, gain) - writes.v
        measured.append(Measured(surprise, error.square().sum(-1), surprise < (rule.threshold or 0.0)))
    if rule.threshold is not None:
        writes = chunks.suppress(rule, writes, found)
    found = chunks.clip(rule, found)
    if rule.steps == "each":
        writes, found = chunks.each_step(writes, found)
    window = window_weights(rule, writes, valid, recent, held)
    if rule.sums:
        y, state = chunks.sums(rule, writes, found, window, valid, state, gain)
    elif rule.moves_once:
        y, state = chunks.one_move(rule, writes, found, window, valid, state, gain, ends)
    elif rule.retention.linear:
        y, state = chunks.made_again(chunks.every_matrix, rule, writes, found, window, valid, state, gain)
    else:
        y, state = chunks.moves(rule, writes, found, window, valid, state, gain)
    return y, state._replace(anchor=where(ends, state.weights, state.anchor), position=after)


def begin(state: LearnerState, rows: Tensor | bool) -> LearnerState:
    """The state in which ``rows`` ``[batch]``, or all, are at a reset: their initial weights, and nothing else."""
    zero = lambda part: where(rows, tuple(map(torch.zeros_like, part)), part)  # noqa: E731
    pending = state.pending
    if pending:
        pending = where(rows, chunks.empty_pending(state.weights, pending[-1]), pending)
    return state._replace(
        weights=where(rows, state.initial, state.weights),
        momentum=zero(state.momentum),
        anchor=where(rows, state.initial, state.anchor),
        second=zero(state.second),
        recent=zero(state.recent),
        pending=pending,
        projection=None if state.projection is None else zero((state.projection,))[0],
    )


def take_window(
    rule: Rule, writes: Writes, state: LearnerState, valid: Tensor | None
) -> tuple[Writes, Tensor, Writes, LearnerState]:
    """The recent writes, their number, these with ``writes``, and the state with the recent ones after ``writes``."""
    k, v, gamma, *parameter, held = state.recent
    recent = writes._replace(k=k, v=v, gamma=gamma, parameter=parameter[0] if parameter else None)
    if writes.gamma is None or writes.gamma.dim() == 4:  # weights of places are those of the later token
        writes = writes._replace(gamma=torch.ones_like(writes.theta))
    parts = [x for x in (writes.k, writes.v, writes.gamma, writes.parameter) if x is not None]
    joined = [torch.cat([old, new], 2) for old, new in zip(state.recent, parts)]
    every = writes._replace(k=joined[0], v=joined[1], parameter=joined[3] if len(joined) > 3 else None)
    size, time = rule.window - 1, writes.theta.shape[2]
    if valid is None:
        kept = [x[:, :, time:].clone() for x in joined]
        count = torch.full_like(held, time)
    else:
        past = torch.arange(-size, 0, device=held.device).expand(len(held), -1) >= -held.unsqueeze(1)
        there = torch.cat([past, valid], 1)
        order = there.to(torch.uint8).argsort(dim=1, stable=True)[:, time:]
        there, kept = there.gather(1, order), []
        for x in joined:  # zero where nothing has been written, and not what stands at a masked token
            index, real = (y.view(len(held), 1, size, *[1] * (x.dim() - 3)) for y in (order, there))
            kept.append(torch.where(real, x.gather(2, index.expand(*x.shape[:2], size, *x.shape[3:])), 0.0))
        count = valid.sum(1)
    state = state._replace(recent=(*kept, (held + count).clamp(max=size)))
    return recent, held, every, state


def complete(rule: Rule, state: MemoryState | LearnerState, writes: Writes) -> LearnerState:
    """The state with every part that the rule needs. Raises ``ValueError`` where an earlier call would have made it."""
    given = LearnerState(*state)
    channels = () if writes.alpha is None or writes.alpha.dim() == 3 else tuple(writes.alpha.shape[3:])
    d_in, d_out = writes.k.shape[-1], writes.v.shape[-1]
    made = start(rule.parts_of_state, rule.window, given, d_in, d_out, channels, writes.parameter is not None)
    if rule.window > 1 and made.recent[0].shape[2] != rule.window - 1:
        raise ValueError(f"state.recent: expected the last {rule.window - 1} writes, as window={rule.window} needs, "
                         f"got {made.recent[0].shape[2]}")  # fmt: skip
    parts = 4 if writes.parameter is None else 5
    if rule.window > 1 and len(made.recent) != parts:
        how = "without" if writes.parameter is None else "with"
        raise ValueError(f"state.recent: expected the last writes {how} a parameter of the objective for each, "
                         "as this rule needs; the state is of another objective")  # fmt: skip
    if rule.moves_once and made.pending[-1].shape[2:] != channels:
        raise ValueError(f"state.pending: expected what is kept of {list(channels)} channels, "
                         f"got {list(made.pending[-1].shape[2:])}")  # fmt: skip
    if made is not given and bool((given.position > 0).any()):
        names = [name for name, old, new in zip(given._fields, given, made) if old is not new]
        raise ValueError(
            f"state: has no {', '.join(names)}, which this rule needs: expected a state that it has made itself, or "
            "one at position 0"
        )
    return made


def start(
    parts: Collection[str], window: int, state: LearnerState, d_in: int, d_out: int, channels: tuple[int, ...],
    parameter: bool,
) -> LearnerState:  # fmt: skip
    """The state with every one of the ``parts``, ``Rule.parts_of_state``, as it is before the first token."""
    weights = state.weights
    batch, heads = weights[0].shape[:2]
    new, size = weights[0].new_zeros, window - 1
    made: dict[str, Any] = {}
    for name in parts:
        if state.has(name):
            continue
        if name == "second":
            made[name] = tuple(map(torch.zeros_like, weights))
        elif name == "pending":
            made[name] = chunks.empty_pending(weights, new(batch, heads, *channels))
        elif name == "recent":
            narrow = [new(batch, heads, size) for _ in range(1 + parameter)]
            held = torch.zeros_like(state.position)
            made[name] = (new(batch, heads, size, d_in), new(batch, heads, size, d_out), *narrow, held)
        elif name == "projection":
            made[name] = new(batch, heads, d_in, d_in)
        else:
            made[name] = weights
    return state._replace(**made) if made else state


def read(rule: Rule, q: Tensor, state: MemoryState | LearnerState, gain: Tensor | None) -> Tensor:
    """``M(q)`` for every query on its own, at the weights of the state.

    ``q``: ``[batch, time, heads, d_in]``; returns ``[batch, time, heads, d_out]``.
    """
    compute = state.weights[0].dtype
    x = q.to(compute).transpose(1, 2)
    if rule.query is not None and isinstance(state, LearnerState) and state.projection is not None:
        x = x @ state.projection
    weights = [rule.retention.link(w) for w in state.weights]
    gain = None if gain is None else gain.to(compute).unsqueeze(1)
    return chunks.read_at(rule, weights, x, gain).transpose(1, 2).to(q.dtype)
