"""Any sequence as whole chunks: cutting at chunk boundaries, and lining up rows that stand at different phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..padding import align
from .chunk_network import ChunkNetwork
from .chunkwise import chunkwise_memory
from .state import MemoryState
from .tokens import Options, Tokens

_Stack: TypeAlias = tuple[Tensor, ...]
_Piece: TypeAlias = tuple[int, int]
"""The token it ends before, and how long its chunks are; empty where it ends with the one before it."""


class _Memory(NamedTuple):
    """What all the pieces of a call have in common."""

    state: MemoryState
    """As it was before the first of them."""
    norm: Tensor | None
    options: Options
    network: Callable[..., ChunkNetwork]

    def write(
        self, tokens: Tokens, real: Tensor | None, anchor: _Stack | None, pieces: list[_Piece]
    ) -> Iterator[tuple[int, Tensor, MemoryState]]:
        """``chunkwise_memory`` of one piece after the other: where it ends, its outputs, the weights and momentum then.

        ``anchor`` is the first piece's, where that begins inside a chunk. Without ``eta`` momentum passes by.
        """
        state = self.state
        weights, momentum = state.weights, () if tokens.eta is None else state.momentum
        start = 0
        for stop, chunk in pieces:
            if stop == start:
                continue
            span, options = slice(start, stop), self.options._replace(chunk=chunk)
            y, weights, momentum = chunkwise_memory(
                tokens.at(span), None if real is None else real[:, span], self.norm,
                weights, momentum, anchor, options, self.network,
            )  # fmt: skip
            yield stop, y, state._replace(weights=weights, momentum=momentum or state.momentum)
            start, anchor = stop, None


def piecewise_memory(
    tokens: Tokens,
    state: MemoryState,
    norm: Tensor | None,
    mask: Tensor | None,
    options: Options,
    network: Callable[..., ChunkNetwork] = ChunkNetwork,
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` in chunks, for any length, positions and mask."""
    if tokens.q.shape[1] == 0:
        return torch.zeros_like(tokens.v), state
    memory = _Memory(state, norm, options, network)
    phases = [position % options.chunk for position in state.position.tolist()]
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is None and len(set(phases)) == 1:
        return _aligned(memory, tokens, phases[0])
    return _ragged(memory, tokens, phases, mask)


def _aligned(memory: _Memory, tokens: Tokens, phase: int) -> tuple[Tensor, MemoryState]:
    """All rows at one phase: the rest of the running chunk, then whole chunks, then the beginning of the last."""
    state, chunk, time = memory.state, memory.options.chunk, tokens.q.shape[1]
    head = min(time, -phase % chunk)
    last = time - (time - head) % chunk  # where the last chunk begins, if it does at all
    pieces = [(head, head), (last, chunk), (time, time - last)]
    anchor, outputs = state.anchor if phase else state.weights, []
    for stop, y, after in memory.write(tokens, None, anchor if phase else None, pieces):
        outputs.append(y)
        if (phase + stop) % chunk == 0:
            anchor = after.weights
    return _joined(outputs), after._replace(anchor=anchor, position=state.position + time)


def _ragged(memory: _Memory, tokens: Tokens, phases: list[int], mask: Tensor | None) -> tuple[Tensor, MemoryState]:
    """Rows at different phases, or masked tokens: every row takes its place in a grid of chunks.

    Empty slots are identity updates (theta = 0, alpha = 0, eta = 1, and no momentum added). A row's anchor is the
    weights as they stood when its last chunk began, so the run pauses wherever some row's last chunk begins.
    """
    state, chunk, theta = memory.state, memory.options.chunk, tokens.theta
    if mask is None:
        mask = torch.ones(theta.shape[:2], dtype=torch.bool, device=theta.device)
    phase = torch.tensor(phases, device=theta.device)
    layout = align(mask, phase)
    if layout.source.shape[1] > chunk:
        layout = align(mask, phase, multiple=chunk)
    slots = layout.source.shape[1]
    if slots == 0:  # every token is masked, and every row at a chunk start
        return torch.zeros_like(tokens.v), state
    size = min(slots, chunk)
    eta = None if tokens.eta is None else layout.spread(tokens.eta, empty=1.0)
    tokens = tokens._replace(eta=None).map(layout.spread)._replace(eta=eta)
    real = layout.filled.unsqueeze(-1).expand_as(tokens.theta).to(tokens.theta)

    last = (phase + layout.length) // chunk * size  # the slot at which each row's last chunk begins
    pick = lambda rows, new, old: tuple(torch.where(rows.view(-1, 1, 1, 1), a, b) for a, b in zip(new, old))  # noqa: E731
    anchor, outputs = pick(phase > 0, state.anchor, state.weights), []
    pieces = [(stop, size) for stop in sorted({*last.tolist(), slots})]
    for stop, y, after in memory.write(tokens, real, anchor, pieces):
        outputs.append(y)
        anchor = pick(last == stop, after.weights, anchor)
    anchor = pick(layout.length > 0, anchor, state.anchor)
    y = layout.collect(_joined(outputs))
    return y, after._replace(anchor=anchor, position=state.position + layout.length)


def _joined(outputs: list[Tensor]) -> Tensor:
    """One piece after the other in time."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
