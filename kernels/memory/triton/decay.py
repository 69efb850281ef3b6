"""The decay matrices of a group of chunks on Triton kernels, with gradients: ``chunk_decay`` of ``decay_torch.py``.

The matrices of a chunk are what its recurrence makes of unit vectors. With ``H`` the coefficients of the tokens'
gradients in the momentum and ``C`` those in the weights,

    H <- eta_t H, and 1 for token t itself      C <- (1 - alpha_t) C + H

so that a chunk is ``b`` steps on two vectors of ``b`` numbers, whose values after step ``t`` are row ``t`` of the
matrices. Three more numbers are the coefficients of the state at the chunk's start (``A``, ``E``, ``m``). There is no
matrix product, logarithm or quotient: gates of 0 and 1 are exact, and sums never cancel. Backward goes through the same
steps in reverse, from the rows that forward has kept.

A program takes ``CHUNKS`` chunks at once, one column for each token, so that short chunks fill a warp. Forward writes
``b^2`` numbers (three times that when they are kept for backward), backward reads three times that: memory-bound.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch import needs_grad
from ...triton_runtime import VARYING, launch
from ..decay_torch import ChunkDecay

_Gates: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""``theta``, ``eta``, ``alpha``, and which slots hold a token."""


def triton_decay(
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    valid: Tensor | None,
    read_after: bool,
    chunk: int | None = None,
) -> ChunkDecay:
    """``chunk_decay``: gates ``[..., b]`` in float32 or float64; ``chunk``: the largest ``b`` of the memory."""
    chunk = chunk or theta.shape[-1]
    if needs_grad(theta, eta, alpha):
        return ChunkDecay(*_Decay.apply(theta, eta, alpha, valid, read_after, chunk))
    return _matrices(theta, eta, alpha, valid, read_after, chunk)[0]


class _Decay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, valid: Tensor | None, read_after: bool,
        chunk: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        shape = theta.shape
        kept = theta.new_empty(1 if eta is None else 2, *shape, shape[-1])
        started = theta.new_empty(1 if eta is None else 3, *shape)
        decay, gates = _matrices(theta, eta, alpha, valid, read_after, chunk, kept, started)
        ctx.read_after, ctx.chunk = read_after, chunk
        ctx.save_for_backward(*gates, kept, started)
        return tuple(decay)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        theta, eta, alpha, valid, kept, started = ctx.saved_tensors
        found = [None if x is None else torch.empty_like(x) for x in (theta, eta, alpha)]
        _run(
            decay_backward_kernel, ctx.chunk, (theta, eta, alpha, valid), kept, started,
            *(x.contiguous() for x in grads), *found, AFTER=ctx.read_after,
        )  # fmt: skip
        return *found, None, None, None


def _matrices(
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    valid: Tensor | None,
    read_after: bool,
    chunk: int,
    kept: Tensor | None = None,
    started: Tensor | None = None,
) -> tuple[ChunkDecay, _Gates]:
    """The matrices, and the gates as the kernel took them."""
    dense = lambda x: None if x is None else x.contiguous()  # noqa: E731
    gates = theta.contiguous(), dense(eta), dense(alpha), dense(valid)
    (*several, b), parts = theta.shape, 1 if eta is None else 2
    shapes = (b, b), (b, parts), (b, parts), (parts, parts)
    decay = ChunkDecay(*(theta.new_empty(*several, *shape) for shape in shapes))
    _run(decay_kernel, chunk, gates, *decay, kept, started, AFTER=read_after, KEEP=kept is not None)
    return decay, gates


def _run(kernel: Any, chunk: int, gates: _Gates, *tensors: Tensor | None, **flags: bool) -> None:
    theta, eta, alpha, valid = gates
    b = theta.shape[-1]
    problems = theta.numel() // b
    if not problems:
        return
    tiles = decay_tiles(chunk)
    launch(
        kernel, (triton.cdiv(problems, tiles["CHUNKS"]),), *gates, *tensors, problems, b,
        MOMENTUM=eta is not None, FORGETTING=alpha is not None, MASKED=valid is not None, **flags, **tiles,
        WIDE=tl.float64 if theta.dtype == torch.float64 else tl.float32,
    )  # fmt: skip


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _gate(gate, first, t, known, GIVEN: tl.constexpr, ABSENT: tl.constexpr, WIDE: tl.constexpr):
    """One token's gate of each chunk; ``ABSENT`` where the memory has no such gate."""
    if GIVEN:
        return tl.load(gate + first + t, mask=known, other=0.0).to(WIDE)
    return tl.full(first.shape, ABSENT, WIDE)


@triton.jit(do_not_specialize=VARYING)
def decay_kernel(
    theta, eta, alpha, valid, read, carry, write, mix, kept, started,
    problems, b,
    MOMENTUM: tl.constexpr, FORGETTING: tl.constexpr, MASKED: tl.constexpr, AFTER: tl.constexpr, KEEP: tl.constexpr,
    CHUNKS: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The matrices of ``CHUNKS`` chunks. With ``KEEP``, every row of ``C`` and ``H``, and ``A``, ``E`` and ``m``."""
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    at = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    known, first = at < problems, at * b
    s = tl.arange(0, TOKENS)
    inside = known[:, None] & (s < b)[None, :]
    step = 2 * tl.load(theta + first[:, None] + s[None, :], mask=inside, other=0.0).to(WIDE)
    C = tl.zeros((CHUNKS, TOKENS), WIDE)
    H = tl.zeros((CHUNKS, TOKENS), WIDE)
    A = tl.full((CHUNKS,), 1.0, WIDE)
    E = tl.full((CHUNKS,), 1.0, WIDE)
    m = tl.zeros((CHUNKS,), WIDE)
    for t in range(b):
        row = (first + t)[:, None] * b + s[None, :]
        place = (first + t) * PARTS
        # zero at tokens that are not written yet, also where their step is not finite
        if not AFTER:
            tl.store(read + row, tl.where((s < t)[None, :], C * step, 0.0), mask=inside)
            tl.store(carry + place, A, mask=known)
            if MOMENTUM:
                tl.store(carry + place + 1, m, mask=known)
        momentum_decay = _gate(eta, first, t, known, MOMENTUM, 0.0, WIDE)
        retention = 1 - _gate(alpha, first, t, known, FORGETTING, 0.0, WIDE)
        added = _gate(valid, first, t, known, MASKED, 1.0, WIDE)
        # before its step a token has no coefficient, whatever the gates are
        H = tl.where((s < t)[None, :], H * momentum_decay[:, None], tl.where(s == t, 1.0, 0.0).to(WIDE)[None, :])
        A = retention * A
        if MOMENTUM:
            C = tl.where((s <= t)[None, :], retention[:, None] * C + added[:, None] * H, 0.0)
            E = momentum_decay * E
            m = retention * m + added * E
        else:
            C = tl.where((s < t)[None, :], retention[:, None] * C, H)
        if AFTER:
            tl.store(read + row, tl.where((s <= t)[None, :], C * step, 0.0), mask=inside)
            tl.store(carry + place, A, mask=known)
            if MOMENTUM:
                tl.store(carry + place + 1, m, mask=known)
        if KEEP:
            tl.store(kept + row, C, mask=inside)
            tl.store(started + (first + t), A, mask=known)
            if MOMENTUM:
                size = tl.cast(problems, tl.int64) * b
                tl.store(kept + size * b + row, H, mask=inside)
                tl.store(started + size + (first + t), E, mask=known)
                tl.store(started + 2 * size + (first + t), m, mask=known)
    column = (first[:, None] + s[None, :]) * PARTS
    corner = at * PARTS * PARTS
    tl.store(write + column, C * step, mask=inside)
    tl.store(mix + corner, A, mask=known)
    if MOMENTUM:
        tl.store(write + column + 1, H * step, mask=inside)
        tl.store(mix + corner + 1, m, mask=known)
        tl.store(mix + corner + 2, tl.zeros((CHUNKS,), WIDE), mask=known)
        tl.store(mix + corner + 3, E, mask=known)


@triton.jit
def _of_step(kept, first, t, s, b, inside, WIDE: tl.constexpr):
    """A kept row, after token ``t``; zero before the first."""
    place = first + t
    there = inside & (place >= first)[:, None]
    return tl.load(kept + place[:, None] * b + s[None, :], mask=there, other=0.0).to(WIDE)


@triton.jit(do_not_specialize=VARYING)
def decay_backward_kernel(
    theta, eta, alpha, valid, kept, started, grad_read, grad_carry, grad_write, grad_mix,
    grad_theta, grad_eta, grad_alpha,
    problems, b,
    MOMENTUM: tl.constexpr, FORGETTING: tl.constexpr, MASKED: tl.constexpr, AFTER: tl.constexpr,
    CHUNKS: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gates' gradients of ``CHUNKS`` chunks, the last token first."""
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    at = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    known, first = at < problems, at * b
    size = tl.cast(problems, tl.int64) * b
    s = tl.arange(0, TOKENS)
    inside = known[:, None] & (s < b)[None, :]
    step = 2 * tl.load(theta + first[:, None] + s[None, :], mask=inside, other=0.0).to(WIDE)
    column = (first[:, None] + s[None, :]) * PARTS
    corner = at * PARTS * PARTS
    C = _of_step(kept, first, b - 1, s, b, inside, WIDE)
    dwrite = tl.load(grad_write + column, mask=inside, other=0.0).to(WIDE)
    dstep, dC = dwrite * C, dwrite * step
    dA = tl.load(grad_mix + corner, mask=known, other=0.0).to(WIDE)
    dH = tl.zeros((CHUNKS, TOKENS), WIDE)
    dE = tl.zeros((CHUNKS,), WIDE)
    dm = tl.zeros((CHUNKS,), WIDE)
    if MOMENTUM:
        dwrite = tl.load(grad_write + column + 1, mask=inside, other=0.0).to(WIDE)
        dstep += dwrite * _of_step(kept + size * b, first, b - 1, s, b, inside, WIDE)
        dH = dwrite * step
        dm = tl.load(grad_mix + corner + 1, mask=known, other=0.0).to(WIDE)
        dE = tl.load(grad_mix + corner + 3, mask=known, other=0.0).to(WIDE)
    for done in range(b):
        t = b - 1 - done
        before = _of_step(kept, first, t - 1, s, b, inside, WIDE)
        dread = tl.load(grad_read + (first + t)[:, None] * b + s[None, :], mask=inside, other=0.0).to(WIDE)
        dkept = tl.load(grad_carry + (first + t) * PARTS, mask=known, other=0.0).to(WIDE)
        if MOMENTUM:
            dadded = tl.load(grad_carry + (first + t) * PARTS + 1, mask=known, other=0.0).to(WIDE)
        if AFTER:
            dstep += dread * C
            dC += dread * step
            dA += dkept
            if MOMENTUM:
                dm += dadded

        momentum_decay = _gate(eta, first, t, known, MOMENTUM, 0.0, WIDE)
        retention = 1 - _gate(alpha, first, t, known, FORGETTING, 0.0, WIDE)
        added = _gate(valid, first, t, known, MASKED, 1.0, WIDE)
        earlier = known & (first + t > first)
        if MOMENTUM:
            E = tl.load(started + size + (first + t - 1), mask=earlier, other=1.0).to(WIDE)
            dH += added[:, None] * dC
            dE += added * dm
            above = _of_step(kept + size * b, first, t - 1, s, b, inside, WIDE)
            tl.store(grad_eta + (first + t), tl.sum(dH * above, axis=1) + dE * E, mask=known)
            dH = tl.where((s < t)[None, :], dH * momentum_decay[:, None], 0.0)
            dE = dE * momentum_decay
        if FORGETTING:
            A = tl.load(started + (first + t - 1), mask=earlier, other=1.0).to(WIDE)
            dretain = tl.sum(dC * before, axis=1) + dA * A
            if MOMENTUM:
                m = tl.load(started + 2 * size + (first + t - 1), mask=earlier, other=0.0).to(WIDE)
                dretain += dm * m
            tl.store(grad_alpha + (first + t), -dretain, mask=known)
        dC = tl.where((s < t)[None, :], dC * retention[:, None], 0.0)
        dA = dA * retention
        dm = dm * retention

        if not AFTER:
            dstep += dread * before
            dC += dread * step
            dA += dkept
            if MOMENTUM:
                dm += dadded
        C = before
    tl.store(grad_theta + first[:, None] + s[None, :], 2 * dstep, mask=inside)


def decay_tiles(chunk: int) -> dict[str, int]:
    """For chunks of up to ``chunk`` tokens: four columns per lane, of one chunk or several."""
    columns = triton.next_power_of_2(chunk)
    return dict(CHUNKS=max(1, 128 // columns), TOKENS=columns, num_warps=min(max(1, columns // 128), 8))
