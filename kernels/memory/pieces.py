"""Any sequence as whole chunks: cutting at chunk boundaries, and lining up rows that stand at different phases."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..layout import align
from .chunk_network import ChunkNetwork
from .chunkwise import Plan, chunkwise_memory
from .state import MemoryState


def piecewise_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: MemoryState,
    *,
    chunk: int,
    activation: str,
    norm: Tensor | None,
    mask: Tensor | None,
    clip: float | None,
    read: str,
    keep: int | None,
    network: type[ChunkNetwork] = ChunkNetwork,
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` in chunks, for any length, positions and mask."""
    plan = Plan(chunk, activation, clip, read == "after", keep, network)
    phases = [position % chunk for position in state.position.tolist()]
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is None and len(set(phases)) == 1:
        return _aligned(q, k, v, theta, eta, alpha, state, norm, phases[0], plan)
    return _ragged(q, k, v, theta, eta, alpha, state, norm, phases, mask, plan)


def _aligned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: MemoryState,
    norm: Tensor | None,
    phase: int,
    plan: Plan,
) -> tuple[Tensor, MemoryState]:
    """All rows at one phase: the rest of the running chunk, then whole chunks, then the beginning of the last."""
    time, chunk = q.shape[1], plan.chunk
    head = min(time, chunk - phase) if phase else 0
    whole = (time - head) // chunk * chunk
    weights, momentum, anchor = state.weights, state.momentum, state.anchor
    inputs = (q, k, v, theta, eta, alpha, None)
    outputs = []
    start = 0
    for size, length in ((head, head), (chunk, whole), (time - head - whole, time - head - whole)):
        if length == 0:
            continue
        tokens = slice(start, start + length)
        inside = start == 0 and phase > 0
        if not inside:
            anchor = weights
        y, weights, momentum = _piece(
            inputs, tokens, norm, weights, momentum, anchor if inside else None, plan._replace(chunk=size)
        )
        outputs.append(y)
        start += length
        if (phase + start) % chunk == 0:
            anchor = weights
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1) if outputs else torch.zeros_like(v)
    return y, MemoryState(tuple(weights), tuple(momentum), tuple(anchor), state.position + time)


def _ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: MemoryState,
    norm: Tensor | None,
    phases: list[int],
    mask: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, MemoryState]:
    """Rows at different phases, or masked tokens: every row takes its place in a grid of chunks.

    Empty slots are identity updates (theta = 0, alpha = 0, eta = 1, and no momentum added). A row's anchor is the
    weights as they stood when its last chunk began, so the run pauses wherever some row's last chunk begins.
    """
    chunk = plan.chunk
    if mask is None:
        mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    phase = torch.tensor(phases, device=q.device)
    layout = align(mask, phase)
    if layout.source.shape[1] > chunk:
        layout = align(mask, phase, multiple=chunk)
    slots = layout.source.shape[1]
    if slots == 0:  # every token is masked, and every row at a chunk start
        return torch.zeros_like(v), state
    size = min(slots, chunk)
    q, k, v, theta = (layout.spread(x) for x in (q, k, v, theta))
    eta = None if eta is None else layout.spread(eta, empty=1.0)
    alpha = None if alpha is None else layout.spread(alpha)
    real = layout.filled.unsqueeze(-1).expand_as(theta).to(theta)

    last_chunk = (phase + layout.length) // chunk
    pick = lambda rows, new, old: tuple(torch.where(rows.view(-1, 1, 1, 1), a, b) for a, b in zip(new, old))  # noqa: E731
    weights, momentum = state.weights, state.momentum
    first = anchor = pick(phase > 0, state.anchor, state.weights)
    inputs = (q, k, v, theta, eta, alpha, real)
    outputs = []
    done = 0
    for stop in sorted({*last_chunk.tolist(), -(-slots // chunk)} - {0}):
        tokens = slice(done * size, stop * size)
        y, weights, momentum = _piece(
            inputs, tokens, norm, weights, momentum, first if done == 0 else None, plan._replace(chunk=size)
        )
        outputs.append(y)
        done = stop
        anchor = pick(last_chunk == stop, weights, anchor)
    anchor = pick(layout.length > 0, anchor, state.anchor)
    y = layout.collect(torch.cat(outputs, 1))
    return y, MemoryState(tuple(weights), tuple(momentum), tuple(anchor), state.position + layout.length)


_Stack: TypeAlias = tuple[Tensor, ...]


def _piece(
    inputs: tuple[Any, ...], tokens: slice, norm: Tensor | None, weights: _Stack, momentum: _Stack,
    anchor: _Stack | None, plan: Plan,
) -> tuple[Tensor, _Stack, _Stack]:  # fmt: skip
    """``chunkwise_memory`` of some tokens of ``inputs``, q k v theta eta alpha real; without eta momentum passes by."""
    taken: list[Any] = [None if x is None else x[:, tokens] for x in inputs]
    q, k, v, theta, eta, alpha, real = taken
    if eta is None:
        y, weights, _ = chunkwise_memory(q, k, v, theta, None, alpha, norm, weights, (), anchor, real, plan)
        return y, weights, momentum
    return chunkwise_memory(q, k, v, theta, eta, alpha, norm, weights, momentum, anchor, real, plan)
