"""``channel_scores`` and ``channel_decay`` of ``channels_torch.py`` on Triton kernels, with gradients.

A program of ``channel_scores`` has some channels of a chunk of one head. It goes from token to token with ``P``,
``[writes, channels]``, in registers: what the token keeps, what its writes add, and the product with its query, which
is summed over the channels of all programs afterwards, in a fixed order. So a chunk is ``b`` steps of a few operations
on ``P``; its ``b`` values, which would be ``b writes channels`` numbers, are never in memory together.

Backward goes through the same steps in reverse. It needs what ``P`` was, and a gate of 0 cannot be undone: a program
first goes forward and stores ``P`` at each token in a place of its own, of which there are as many as programs.

A program of ``channel_decay`` has some channels of a chunk of one head, and goes from token to token with their
products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import VARYING, launch

PLACES = 256
"""Programs of backward at most; each takes chunk after chunk."""


def triton_channel_scores(
    x: Tensor, a: Tensor, keep: Tensor, added: Tensor, delay: int, most: int | None = None
) -> Tensor:
    """``channel_scores``; tensors are in float32 or float64. Tiles go by ``most``, the writes of a whole chunk."""
    tiles = channel_tiles(most or a.shape[1], x.shape[2])
    scores: Tensor = _Scores.apply(delay, tiles, *(y.contiguous() for y in (x, a, keep, added)))
    return scores


def triton_channel_decay(keep: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """``channel_decay``; tensors are in float32 or float64."""
    flat = keep.flatten(0, 1).contiguous()
    kept, later, *moved = _Decay.apply(flat, None if added is None else added.flatten(0, 1).contiguous())
    return kept.view(keep.shape), later.view(keep.shape), moved[0].view(keep.shape) if moved else None


def channel_tiles(writes: int, channels: int) -> dict[str, int]:
    """``P`` has 4096 numbers, if the chunk is not longer than 1024 tokens."""
    rows = triton.next_power_of_2(writes)
    few = min(max(4, 4096 // rows), triton.next_power_of_2(channels))
    return dict(WRITES=rows, CHANNELS=few, num_warps=8)


def _run(
    kernel: Any, delay: int, tiles: dict[str, int], programs: int, given: tuple[Tensor, ...], *tensors: Tensor
) -> None:
    x, a, *_ = given
    (rows, b, channels), writes = x.shape, a.shape[1]
    launch(
        kernel, (programs, triton.cdiv(channels, tiles["CHANNELS"])), *given, *tensors, rows, b, writes, channels,
        DELAY=delay, WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32, **tiles,
    )  # fmt: skip


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, delay: int, tiles: dict[str, int], *given: Tensor) -> Tensor:
        x, _, _, added = given
        ctx.delay, ctx.tiles = delay, tiles
        ctx.save_for_backward(*given)
        parts = triton.cdiv(x.shape[2], tiles["CHANNELS"])
        scores = x.new_empty(parts, *added.shape)
        _run(channel_scores_kernel, delay, tiles, len(x), given, scores)
        return scores.sum(0) if parts > 1 else scores[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        x, a, keep, added = given
        tiles = ctx.tiles
        parts, programs = triton.cdiv(x.shape[2], tiles["CHANNELS"]), min(len(x), PLACES)
        kept = x.new_empty(programs * parts * x.shape[1] * tiles["WRITES"] * tiles["CHANNELS"])
        grad_x, grad_a, grad_keep = map(torch.empty_like, (x, a, keep))
        grad_added = x.new_empty(parts, *added.shape)
        _run(
            channel_scores_backward_kernel, ctx.delay, tiles, programs, given, grad.contiguous(), kept,
            grad_x, grad_a, grad_keep, grad_added,
        )  # fmt: skip
        return None, None, grad_x, grad_a, grad_keep, grad_added.sum(0)


class _Decay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: Tensor, added: Tensor | None) -> tuple[Tensor, ...]:
        found = [torch.empty_like(keep) for _ in range(2 if added is None else 3)]
        _run_decay(channel_decay_kernel, keep, added, *found, *[None] * (3 - len(found)))
        ctx.save_for_backward(keep, *found)
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        keep, *found = ctx.saved_tensors
        grad_keep, grad_added, none = torch.empty_like(keep), None, [None] * (3 - len(found))
        if len(found) == 3:
            parts = triton.cdiv(keep.shape[2], decay_channels(keep.shape[2]))
            grad_added = keep.new_empty(parts, *keep.shape[:2])
        _run_decay(
            channel_decay_backward_kernel, keep, grad_added, *found, *none, *(g.contiguous() for g in grads), *none,
            grad_keep,
        )  # fmt: skip
        return grad_keep, None if grad_added is None else grad_added.sum(0)


def decay_channels(channels: int) -> int:
    """The channels of a program."""
    return min(128, triton.next_power_of_2(channels))


def _run_decay(kernel: Any, keep: Tensor, *tensors: Tensor | None) -> None:
    rows, b, channels = keep.shape
    few, moves = decay_channels(channels), tensors[0] is not None
    launch(
        kernel, (rows, triton.cdiv(channels, few)), keep, *tensors, rows, b, channels,
        MOVES=moves, CHANNELS=few, WIDE=tl.float64 if keep.dtype == torch.float64 else tl.float32, num_warps=4,
    )  # fmt: skip


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _row(x, place, size, n, inside, WIDE: tl.constexpr):
    """Row ``place`` of a matrix of ``size`` columns."""
    return tl.load(x + place * size + n, mask=inside, other=0.0).to(WIDE)


@triton.jit
def _store_scores(to, P, query, seen, inside):
    """A query's product with each ``P_s``; zero for later writes, also where they are not finite."""
    tl.store(to, tl.where(seen, tl.sum(P * query[None, :], axis=1), 0.0), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def channel_scores_kernel(
    x, a, keep, added, scores,
    problems, b, writes, channels,
    DELAY: tl.constexpr, WRITES: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, ``CHANNELS`` channels; ``scores`` ``[parts, problems, b, writes]``."""
    row = tl.program_id(0).to(tl.int64)
    s, i = tl.arange(0, WRITES), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    written, known = s < writes, i < channels
    tile = written[:, None] & known[None, :]
    inputs = tl.load(a + (row * writes + s[:, None]) * channels + i[None, :], mask=tile, other=0.0).to(WIDE)
    to = scores + (tl.program_id(1) * tl.cast(problems, tl.int64) + row) * b * writes + s
    P = tl.zeros((WRITES, CHANNELS), WIDE)
    for t in range(b):
        at = row * b + t
        query = _row(x, at, channels, i, known, WIDE)
        if DELAY:
            _store_scores(to + t * writes, P, query, s < t + writes - b, written)
        P = P * _row(keep, at, channels, i, known, WIDE)[None, :]
        P += _row(added, at, writes, s, written, WIDE)[:, None] * inputs
        if not DELAY:
            _store_scores(to + t * writes, P, query, s <= t + writes - b, written)


@triton.jit(do_not_specialize=VARYING)
def channel_scores_backward_kernel(
    x, a, keep, added, grad, kept, grad_x, grad_a, grad_keep, grad_added,
    problems, b, writes, channels,
    DELAY: tl.constexpr, WRITES: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk of ``CHANNELS`` channels; ``grad_added`` ``[parts, problems, b, writes]``."""
    s, i = tl.arange(0, WRITES), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    written, known = s < writes, i < channels
    tile = written[:, None] & known[None, :]
    n = tl.arange(0, WRITES)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    own = kept + place * b * (WRITES * CHANNELS) + n
    for row in range(tl.program_id(0).to(tl.int64), problems, tl.num_programs(0)):
        inside = (row * writes + s[:, None]) * channels + i[None, :]
        inputs = tl.load(a + inside, mask=tile, other=0.0).to(WIDE)
        P = tl.zeros((WRITES, CHANNELS), WIDE)
        for t in range(b):
            at = row * b + t
            tl.store(own + t * (WRITES * CHANNELS), P)
            P = P * _row(keep, at, channels, i, known, WIDE)[None, :]
            P += _row(added, at, writes, s, written, WIDE)[:, None] * inputs
        to = grad_added + (tl.program_id(1) * tl.cast(problems, tl.int64) + row) * b * writes + s
        dP = tl.zeros((WRITES, CHANNELS), WIDE)
        dinputs = tl.zeros((WRITES, CHANNELS), WIDE)
        for back in range(b):
            t = b - 1 - back
            at = row * b + t
            before = tl.load(own + t * (WRITES * CHANNELS))
            gates = _row(keep, at, channels, i, known, WIDE)
            weights = _row(added, at, writes, s, written, WIDE)
            # the query that reads what this token leaves, if there is one
            reads = known & (i * 0 + t + DELAY < b)
            seen = written & (s <= t + writes - b) & (s * 0 + t + DELAY < b)
            dscores = _row(grad, at + DELAY, writes, s, seen, WIDE)
            query = _row(x, at + DELAY, channels, i, reads, WIDE)
            after = before * gates[None, :] + weights[:, None] * inputs
            tl.store(grad_x + (at + DELAY) * channels + i, tl.sum(dscores[:, None] * after, axis=0), mask=reads)
            dP += dscores[:, None] * query[None, :]
            tl.store(to + t * writes, tl.sum(dP * inputs, axis=1), mask=written)
            tl.store(grad_keep + at * channels + i, tl.sum(dP * before, axis=0), mask=known)
            dinputs += dP * weights[:, None]
            dP = dP * gates[None, :]
        if DELAY:
            tl.store(grad_x + row * b * channels + i, tl.zeros((CHANNELS,), WIDE), mask=known)
        tl.store(grad_a + inside, dinputs, mask=tile)
        tl.debug_barrier()


@triton.jit(do_not_specialize=VARYING)
def channel_decay_kernel(
    keep, moves, kept, later, moved,
    problems, b, channels,
    MOVES: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``CHANNELS`` channels of a chunk of one head: forwards ``A`` and ``m``, and backwards what later tokens keep."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = i < channels
    A, m = tl.full((CHANNELS,), 1.0, WIDE), tl.zeros((CHANNELS,), WIDE)
    for t in range(b):
        at = row * b + t
        gates = _row(keep, at, channels, i, known, WIDE)
        A *= gates
        tl.store(kept + at * channels + i, A, mask=known)
        if MOVES:
            m = m * gates + tl.load(moves + at).to(WIDE)
            tl.store(moved + at * channels + i, m, mask=known)
    A = tl.full((CHANNELS,), 1.0, WIDE)
    for back in range(b):
        at = row * b + b - 1 - back
        tl.store(later + at * channels + i, A, mask=known)
        A *= _row(keep, at, channels, i, known, WIDE)


@triton.jit(do_not_specialize=VARYING)
def channel_decay_backward_kernel(
    keep, grad_added, kept, later, moved, grad_kept, grad_later, grad_moved, grad_keep,
    problems, b, channels,
    MOVES: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The same channels of the gradients; ``grad_added`` ``[parts, problems, b]``."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = i < channels
    dA, dm = tl.zeros((CHANNELS,), WIDE), tl.zeros((CHANNELS,), WIDE)
    for back in range(b):
        t = b - 1 - back
        at = row * b + t
        gates = _row(keep, at, channels, i, known, WIDE)
        earlier = known & (i * 0 + t > 0)
        dA += _row(grad_kept, at, channels, i, known, WIDE)
        before = _row(kept, at - 1, channels, i, earlier, WIDE)
        total = dA * tl.where(i * 0 + t > 0, before, 1.0)
        dA *= gates
        if MOVES:
            dm += _row(grad_moved, at, channels, i, known, WIDE)
            total += dm * _row(moved, at - 1, channels, i, earlier, WIDE)
            part = tl.program_id(1) * tl.cast(problems, tl.int64)
            tl.store(grad_added + part * b + at, tl.sum(dm, axis=0))
            dm *= gates
        tl.store(grad_keep + at * channels + i, total, mask=known)
    tl.debug_barrier()
    dlater = tl.zeros((CHANNELS,), WIDE)
    for t in range(b):
        at = row * b + t
        total = _row(grad_keep, at, channels, i, known, WIDE)
        total += dlater * _row(later, at, channels, i, known, WIDE)
        tl.debug_barrier()
        tl.store(grad_keep + at * channels + i, total, mask=known)
        dlater = dlater * _row(keep, at, channels, i, known, WIDE) + _row(grad_later, at, channels, i, known, WIDE)
