"""How much of every past write is left, in Triton: what ``memory.decay`` does, forward and backward.

The story. The matrices of a chunk are what its recurrence makes of unit vectors. With ``H`` what momentum holds of each
token's gradient and ``C`` what the weights hold of it,

    H <- eta_t H, and 1 for token t itself      C <- (1 - alpha_t) C + H

so that a chunk is ``b`` steps on two vectors of ``b`` numbers, whose values after step ``t`` are row ``t`` of the
matrices; the state at the chunk's start is three numbers more (``A``, ``E``, ``m``: what is left of the weights and of
the momentum, and what that has added to the weights). No product of matrices, no logarithm and no quotient: gates of 0
and 1 are exact, and sums never cancel. Backward walks the same steps in reverse, from the rows that forward has kept.

A program takes ``MANY`` chunks at once, one column for each token; a short chunk leaves no lane of a warp idle. Bytes:
forward writes ``b^2`` numbers (three times that to keep them for backward), backward reads three times that: bound by
memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gate(gate, first, t, known, GIVEN: tl.constexpr, ABSENT: tl.constexpr, WIDE: tl.constexpr):
    """One token of each chunk; what a gate that is not there stands for."""
    if GIVEN:
        return tl.load(gate + first + t, mask=known, other=0.0).to(WIDE)
    return tl.full(first.shape, ABSENT, WIDE)


@triton.jit
def decay_kernel(
    theta, eta, alpha, real, read, carry, write, mix, held, started,
    problems, b,
    MOMENTUM: tl.constexpr, FORGETTING: tl.constexpr, MASKED: tl.constexpr, AFTER: tl.constexpr, KEEP: tl.constexpr,
    MANY: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The matrices of ``MANY`` chunks. With ``KEEP``, every row of ``C`` and ``H``, and ``A``, ``E`` and ``m``."""
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    at = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    known, first = at < problems, at * b
    s = tl.arange(0, TOKENS)
    inside = known[:, None] & (s < b)[None, :]
    step = 2 * tl.load(theta + first[:, None] + s[None, :], mask=inside, other=0.0).to(WIDE)
    C = tl.zeros((MANY, TOKENS), WIDE)
    H = tl.zeros((MANY, TOKENS), WIDE)
    A = tl.full((MANY,), 1.0, WIDE)
    E = tl.full((MANY,), 1.0, WIDE)
    m = tl.zeros((MANY,), WIDE)
    for t in range(b):
        row = (first + t)[:, None] * b + s[None, :]
        place = (first + t) * PARTS
        if not AFTER:
            tl.store(read + row, C * step, mask=inside)
            tl.store(carry + place, A, mask=known)
            if MOMENTUM:
                tl.store(carry + place + 1, m, mask=known)
        lasting = _gate(eta, first, t, known, MOMENTUM, 0.0, WIDE)
        retain = 1 - _gate(alpha, first, t, known, FORGETTING, 0.0, WIDE)
        added = _gate(real, first, t, known, MASKED, 1.0, WIDE)
        # of a token nothing is there before its step, whatever the gates are
        H = tl.where((s < t)[None, :], H * lasting[:, None], tl.where(s == t, 1.0, 0.0).to(WIDE)[None, :])
        A = retain * A
        if MOMENTUM:
            C = tl.where((s <= t)[None, :], retain[:, None] * C + added[:, None] * H, 0.0)
            E = lasting * E
            m = retain * m + added * E
        else:
            C = tl.where((s < t)[None, :], retain[:, None] * C, H)
        if AFTER:
            tl.store(read + row, C * step, mask=inside)
            tl.store(carry + place, A, mask=known)
            if MOMENTUM:
                tl.store(carry + place + 1, m, mask=known)
        if KEEP:
            tl.store(held + row, C, mask=inside)
            tl.store(started + (first + t), A, mask=known)
            if MOMENTUM:
                size = tl.cast(problems, tl.int64) * b
                tl.store(held + size * b + row, H, mask=inside)
                tl.store(started + size + (first + t), E, mask=known)
                tl.store(started + 2 * size + (first + t), m, mask=known)
    column = (first[:, None] + s[None, :]) * PARTS
    corner = at * PARTS * PARTS
    tl.store(write + column, C * step, mask=inside)
    tl.store(mix + corner, A, mask=known)
    if MOMENTUM:
        tl.store(write + column + 1, H * step, mask=inside)
        tl.store(mix + corner + 1, m, mask=known)
        tl.store(mix + corner + 2, tl.zeros((MANY,), WIDE), mask=known)
        tl.store(mix + corner + 3, E, mask=known)


@triton.jit
def _of_step(held, first, t, s, b, inside, WIDE: tl.constexpr):
    """A row of what was kept, after token ``t``; before the first, nothing."""
    place = first + t
    there = inside & (place >= first)[:, None]
    return tl.load(held + place[:, None] * b + s[None, :], mask=there, other=0.0).to(WIDE)


@triton.jit
def decay_backward_kernel(
    theta, eta, alpha, real, held, started, grad_read, grad_carry, grad_write, grad_mix,
    grad_theta, grad_eta, grad_alpha,
    problems, b,
    MOMENTUM: tl.constexpr, FORGETTING: tl.constexpr, MASKED: tl.constexpr, AFTER: tl.constexpr,
    MANY: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gates' gradients of ``MANY`` chunks, the last token first."""
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    at = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    known, first = at < problems, at * b
    size = tl.cast(problems, tl.int64) * b
    s = tl.arange(0, TOKENS)
    inside = known[:, None] & (s < b)[None, :]
    step = 2 * tl.load(theta + first[:, None] + s[None, :], mask=inside, other=0.0).to(WIDE)
    column = (first[:, None] + s[None, :]) * PARTS
    corner = at * PARTS * PARTS
    C = _of_step(held, first, b - 1, s, b, inside, WIDE)
    to_write = tl.load(grad_write + column, mask=inside, other=0.0).to(WIDE)
    to_step, to_C = to_write * C, to_write * step
    to_A = tl.load(grad_mix + corner, mask=known, other=0.0).to(WIDE)
    to_H = tl.zeros((MANY, TOKENS), WIDE)
    to_E = tl.zeros((MANY,), WIDE)
    to_m = tl.zeros((MANY,), WIDE)
    if MOMENTUM:
        to_write = tl.load(grad_write + column + 1, mask=inside, other=0.0).to(WIDE)
        to_step += to_write * _of_step(held + size * b, first, b - 1, s, b, inside, WIDE)
        to_H = to_write * step
        to_m = tl.load(grad_mix + corner + 1, mask=known, other=0.0).to(WIDE)
        to_E = tl.load(grad_mix + corner + 3, mask=known, other=0.0).to(WIDE)
    for done in range(b):
        t = b - 1 - done
        before = _of_step(held, first, t - 1, s, b, inside, WIDE)
        to_read = tl.load(grad_read + (first + t)[:, None] * b + s[None, :], mask=inside, other=0.0).to(WIDE)
        to_kept = tl.load(grad_carry + (first + t) * PARTS, mask=known, other=0.0).to(WIDE)
        if MOMENTUM:
            to_added = tl.load(grad_carry + (first + t) * PARTS + 1, mask=known, other=0.0).to(WIDE)
        if AFTER:
            to_step += to_read * C
            to_C += to_read * step
            to_A += to_kept
            if MOMENTUM:
                to_m += to_added

        lasting = _gate(eta, first, t, known, MOMENTUM, 0.0, WIDE)
        retain = 1 - _gate(alpha, first, t, known, FORGETTING, 0.0, WIDE)
        added = _gate(real, first, t, known, MASKED, 1.0, WIDE)
        earlier = known & (first + t > first)
        if MOMENTUM:
            E = tl.load(started + size + (first + t - 1), mask=earlier, other=1.0).to(WIDE)
            to_H += added[:, None] * to_C
            to_E += added * to_m
            above = _of_step(held + size * b, first, t - 1, s, b, inside, WIDE)
            tl.store(grad_eta + (first + t), tl.sum(to_H * above, axis=1) + to_E * E, mask=known)
            to_H = tl.where((s < t)[None, :], to_H * lasting[:, None], 0.0)
            to_E = to_E * lasting
        if FORGETTING:
            A = tl.load(started + (first + t - 1), mask=earlier, other=1.0).to(WIDE)
            to_retain = tl.sum(to_C * before, axis=1) + to_A * A
            if MOMENTUM:
                m = tl.load(started + 2 * size + (first + t - 1), mask=earlier, other=0.0).to(WIDE)
                to_retain += to_m * m
            tl.store(grad_alpha + (first + t), -to_retain, mask=known)
        to_C = tl.where((s < t)[None, :], to_C * retain[:, None], 0.0)
        to_A = to_A * retain
        to_m = to_m * retain

        if not AFTER:
            to_step += to_read * before
            to_C += to_read * step
            to_A += to_kept
            if MOMENTUM:
                to_m += to_added
        C = before
    tl.store(grad_theta + first[:, None] + s[None, :], 2 * to_step, mask=inside)


def decay_tiles(b: int) -> dict[str, int]:
    """Of chunks of ``b`` tokens: four columns a lane of one warp, whether of one chunk or of several."""
    columns = triton.next_power_of_2(b)
    return dict(MANY=max(1, 128 // columns), TOKENS=columns, num_warps=1)
