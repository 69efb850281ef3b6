"""Splits sequences at segment boundaries. Also: optional methods that ``context`` calls if a block defines them.

``every`` computes outputs at some tokens only, and ``bound`` limits a window. Other blocks are called as usual. The
part of the neural memory that does not depend on its state runs once for all segments.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.dispatch import on_host, seen
from ..kernels.documents import Documents, Step
from ..kernels.linear import is_plain, is_unmodified
from ..kernels.padding import Layout, align
from .attention import Attention
from .block import Block, as_memory
from .memory import NeuralMemory
from .state import State


def forward_every(
    block: Block,
    x: Tensor,
    state: State,
    *,
    step: int,
    mask: Tensor | None = None,
    documents: Documents | None = None,
    unused: bool = False,
) -> tuple[Tensor, State]:
    """``block(x, state, mask=mask)``, with the outputs at every ``step``-th token only, ``[batch, time / step, dim]``.

    ``time`` is a multiple of ``step``, and ``mask`` is equal for all tokens of a step. ``block.every`` is used if the
    class that defines ``forward`` defines it too. ``documents``: those of a packed row of ``time / step`` tokens.
    ``unused``: the state that is returned is not used, and need not be computed.
    """
    every: Any = block.every if step > 1 and block.has_every and is_unmodified(block, "forward") else None
    if documents is None:
        if every is not None:
            exact = type(block) is Attention and "every" not in vars(block)
            others: dict[str, Any] = {"ends": []} if unused and exact else {}
            return every(x, state, step=step, mask=mask, **others)
        y, state = block(x, state, mask=mask)
    else:
        if every is not None and "documents" in inspect.signature(every).parameters:
            return every(x, state, step=step, mask=mask, documents=documents)
        y, state = block(x, state, mask=mask, documents=documents if step == 1 else documents.repeated(step))
    return y if step == 1 else y[:, step - 1 :: step], state


def limit_window(block: Block, tokens: int) -> None:
    """Limit the windows of ``block`` and its delegates, which process at most ``tokens`` tokens from a fresh state."""
    bound: Any = getattr(block, "bound", None)
    if bound is not None:
        bound(tokens)
    for field in block.delegates:
        inner = getattr(block, field)
        for child in [inner] if isinstance(inner, Block) else inner:
            limit_window(child, tokens)


class SplitMemory(NamedTuple):
    """A memory in four parts. The parts that need no state, ``project`` and ``output``, run once for all segments.

    ``memory.read(x, state)`` is ``read(project(x), state)``. ``memory(x, state)`` is ``update(x, state)``, followed by
    ``output``.
    """

    project: Callable[[Tensor], tuple[Tensor, ...]]
    """``project(x)``: tensors ``[batch, time, ...]``."""
    read: Callable[[Sequence[Tensor], State], Tensor]
    """``read(project(x), state)``: the memory's response ``[batch, time, dim]``."""
    update: Callable[..., tuple[Tensor, State]]
    """``update(x, state, mask=mask, documents=documents)``: the inputs of ``output`` and the next state."""
    output: Callable[[Tensor, Tensor], Tensor]
    """``output(y, x)``: the memory's outputs ``[batch, time, dim]``. Those at masked tokens are not used."""


def split_memory(memory: Block, pieces: int) -> SplitMemory:
    """Split the methods of ``memory`` for a sequence of ``pieces`` parts."""
    splits = pieces > 1 and type(memory) is NeuralMemory and not torch.compiler.is_compiling()
    if splits and isinstance(memory, NeuralMemory) and is_unmodified(memory, "forward", "read"):
        return SplitMemory(memory.project_queries, memory.read_projected, memory.update, memory.project_output)
    return SplitMemory(lambda x: (x,), lambda x, state: as_memory(memory).read(x[0], state), memory, lambda y, x: y)


# -- segments ----------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A range of the time axis in which no row crosses a segment boundary."""

    start: int
    stop: int
    begins: list[bool] | Tensor
    """For each row, whether a segment other than its first begins at ``start``. A tensor under ``torch.compile``."""
    whole: bool
    """Whether the range is exactly one full segment of every row."""
    valid: Tensor | None
    """``[batch, stop - start]`` bool: true at valid tokens; ``None`` if all are valid."""


def pieces_of(segment: int, positions: list[int], lengths: list[int], filled: Tensor | None) -> list[Piece]:
    """Divide the time axis at every segment boundary of the rows that still have tokens."""
    slots, start = max(lengths, default=0), 0
    pieces = []
    while start < slots:
        stop, begins, aligned = slots, [], True
        for position, length in zip(positions, lengths):
            present, phase = start < length, (position + start) % segment
            if present:
                stop = min(stop, start + segment - phase)
            # at position 0 the state is that of init_state: nothing to restart
            begins.append(present and phase == 0 and position + start > 0)
            aligned = aligned and phase == 0
        full = min(lengths) >= stop
        whole = full and aligned and stop - start == segment
        valid = None
        if not full and filled is not None:
            valid = filled[:, start:stop]
            if not valid.is_cpu:
                seen(valid, on_host(filled)[:, start:stop])
        pieces.append(Piece(start, stop, begins, whole, valid))
        start = stop
    return pieces


def traced_pieces(segment: int, x: Tensor, mask: Tensor | None, position: Tensor) -> tuple[Layout, list[Piece]]:
    """Returns pieces whose boundaries do not depend on data, for ``torch.compile``.

    Row b is shifted right so that its first segment boundary is at slot ``min(time, segment)``. Some rows then have
    empty slots or an empty piece.
    """
    rows, time, _ = x.shape
    first = min(time, segment)
    phase = position % segment
    offset = first - (segment - phase).clamp(max=first)
    if mask is None:
        mask = torch.ones(rows, time, dtype=torch.bool, device=x.device)
    slots = max(first + time - 1, 0)
    layout = align(mask, offset, slots=slots)
    pieces: list[Piece] = []
    start, stop = 0, first
    while start < slots:
        valid = layout.filled[:, start:stop]
        # after the first boundary, every row with a token here begins a segment
        begins = valid[:, 0] if pieces else valid.any(1) & (phase == 0) & (position > 0)
        pieces.append(Piece(start, stop, begins, False, valid))
        start, stop = stop, min(stop + segment, slots)
    return layout, pieces


def independent(block: Block, pieces: Sequence[Piece]) -> range:
    """The pieces that ``Attention.segments`` computes, if ``block`` has it: whole segments, before which and after
    which every row begins one. Of other blocks, and of segments that others interrupt, none."""
    if type(block) is not Attention or not is_unmodified(block, "forward", "every") or not is_plain(block.qkv):
        return range(0)
    found = []
    for i, (piece, after) in enumerate(itertools.pairwise(pieces)):
        if piece.whole and isinstance(after.begins, list) and all(after.begins):
            found.append(i)
    return range(found[0], found[-1] + 1) if found and found[-1] - found[0] < len(found) else range(0)


def split(pieces: Sequence[Piece | Step], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield each piece with its part of the tensors. The gradient of a slice would be as long as the whole tensor."""
    lengths, parts = [], []
    for piece in pieces:
        lengths.append(piece.stop - piece.start)
    for x in tensors:
        parts.append(x.split_with_sizes(lengths, dim=1))
    return zip(pieces, *parts)
