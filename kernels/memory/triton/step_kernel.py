"""One token written into and read from a memory, in Triton: what ``memory.step`` does, in one launch.

The story. A program has one row (a batch row and a head). It takes the key through the anchor's weights, ``BLOCK``
hidden units at a time, and then passes over the state once: for each block of hidden units it takes the error back,
moves weights and momentum on, and asks what they have become. All of this is vectors against matrices, so there is
nothing for the matrix units to do, and time is what it takes to move the state: weights, momentum and anchor are read
and written once each, ``12 d width`` numbers of float32 for a network ``d -> width -> d`` (``8 d width`` with chunks of
one token, which have no anchor). What is needed again, the anchor's last layer and, where the chunk starts and the
weights are the anchor, these, comes from the cache.

Nothing is asked of the host: where a row stands in its chunk, the kernel finds out. So the anchor is written at every
token, though it only changes at the ends of chunks: it saves waiting for the GPU, which takes longer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .network_kernel import activate, normalise, pull, slope
from .tiles_kernel import load, store


@triton.jit
def _vector(x, column, columns, WIDE: tl.constexpr):
    return tl.load(x + column, mask=column < columns, other=0.0).to(WIDE)


@triton.jit
def _along(matrix, x):
    """``matrix x``."""
    return tl.sum(matrix * x[None, :], axis=1)


@triton.jit
def _back(matrix, g):
    """``matrix^T g``."""
    return tl.sum(matrix * g[:, None], axis=0)


@triton.jit
def _move(weight, momentum, new_weight, new_momentum, new_anchor, r, c, rows, columns,
          push, lasting, retain, real, ends,
          MOMENTUM: tl.constexpr, FORGETTING: tl.constexpr, ANCHORED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A tile of a layer, before and after the token. Where there is no token, as it was, whatever lies in its place."""
    old = load(weight, r, c, rows, columns, WIDE)
    surprise = push
    if MOMENTUM:
        before = load(momentum, r, c, rows, columns, WIDE)
        surprise += lasting * before
        store(new_momentum, r, c, rows, columns, tl.where(real, surprise, before))
    new = old
    if FORGETTING:
        new = retain * old
    new = tl.where(real, new + surprise, old)
    store(new_weight, r, c, rows, columns, new)
    if ANCHORED:  # known when compiling, and the rest is not  # noqa: SIM102
        if ends:
            store(new_anchor, r, c, rows, columns, new)
    return old, new


@triton.jit
def step_kernel(
    q, k, v, theta, eta, alpha, gain, mask, position,
    weight_1, weight_2, momentum_1, momentum_2, anchor_1, anchor_2,
    y, new_weight_1, new_weight_2, new_momentum_1, new_momentum_2, new_anchor_1, new_anchor_2, hidden,
    heads, d_in, width, d_out, chunk, clip, eps,
    q_row, q_head, k_row, k_head, v_row, v_head,
    theta_row, theta_head, eta_row, eta_head, alpha_row, alpha_head, mask_row,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, MOMENTUM: tl.constexpr, FORGETTING: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, MASKED: tl.constexpr, ANCHORED: tl.constexpr, AFTER: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One row. Depth 2: ``d_in -> width -> d_out``; depth 1, ``width -> d_out``, in layer 2's place.

    State tensors are dense ``[batch, heads, out, in]``; ``*_row`` and ``*_head`` are steps from batch row to batch row
    and from head to head. ``ANCHORED``: chunks are longer than one token. ``hidden``: room for ``width`` numbers a row.
    """
    at = tl.program_id(0).to(tl.int64)
    row, head = at // heads, at % heads
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    size_1, size_2 = width * d_in, d_out * width
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    weight_1 += at * size_1
    weight_2 += at * size_2
    real = True
    if MASKED:
        real = tl.load(mask + row * mask_row) != 0
    a_1, a_2, inside, ends = weight_1, weight_2, False, False
    if ANCHORED:
        phase = tl.load(position + row) % chunk
        inside = (phase != 0) | (real == 0)  # then the anchor stays what it is
        ends = (phase + 1 == chunk) & real
        new_anchor_1 += at * size_1
        new_anchor_2 += at * size_2
        if inside:
            a_1, a_2 = anchor_1 + at * size_1, anchor_2 + at * size_2

    # the key forward through the anchor
    key, value = _vector(k, i, d_in, WIDE), _vector(v + row * v_row + head * v_head, o, d_out, WIDE)
    z = tl.zeros((OUT,), WIDE)
    squares = 0.0  # of the last layer's input
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            tile_1 = load(a_1, h, i, width, d_in, WIDE)
            below = _along(tile_1, key)
            tl.store(hidden + at * width + h, below, mask=h < width)
            a = activate(below, ACTIVATION)
        else:
            a = _vector(k, h, width, WIDE)
        tile = load(a_2, o, h, d_out, width, WIDE)
        z += _along(tile, a)
        squares += tl.sum(a * a)
        if ANCHORED:  # noqa: SIM102
            if ends == 0:
                if LAYERS == 2:
                    store(new_anchor_1, h, i, width, d_in, tile_1)
                store(new_anchor_2, o, h, d_out, width, tile)

    # the error
    of_gain = tl.full((OUT,), 1.0, WIDE)
    if NORM:
        of_gain = _vector(gain + head * d_out, o, d_out, WIDE)
        n, inverse = normalise(z[None, :], o < d_out, d_out, eps)
        residual = _vector(k, o, d_in, WIDE)
        miss = (residual - value)[None, :] + n * of_gain[None, :]
        error = tl.sum(pull(miss * of_gain[None, :], n, inverse, o < d_out, d_out), axis=0)
    else:
        error = z - value
    tl.debug_barrier()

    step = 2 * tl.load(theta + row * theta_row + head * theta_head).to(WIDE)
    if CLIP:
        squares *= tl.sum(error * error)
        if LAYERS == 2:
            pushed = 0.0
            for h0 in range(0, width, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                below = _vector(hidden + at * width, h, width, WIDE)
                e = _back(load(a_2, o, h, d_out, width, WIDE), error) * slope(below, ACTIVATION)
                pushed += tl.sum(e * e)
            squares += pushed * tl.sum(key * key)
        # a norm that is NaN spoils the step, as it does everywhere
        norm = 2 * tl.sqrt(squares)
        step = tl.where(norm > clip, step * (clip / norm), step * (1 + 0 * norm))
    lasting, retain = 0.0, 1.0
    if MOMENTUM:
        lasting = tl.load(eta + row * eta_row + head * eta_head).to(WIDE)
        momentum_1 += at * size_1
        momentum_2 += at * size_2
        new_momentum_1 += at * size_1
        new_momentum_2 += at * size_2
    if FORGETTING:
        retain = 1 - tl.load(alpha + row * alpha_row + head * alpha_head).to(WIDE)
    new_weight_1 += at * size_1
    new_weight_2 += at * size_2

    # the state on, and the query through it
    query = _vector(q, i, d_in, WIDE)
    z = tl.zeros((OUT,), WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            below = _vector(hidden + at * width, h, width, WIDE)
            a = activate(below, ACTIVATION)
            e = _back(load(a_2, o, h, d_out, width, WIDE), error) * slope(below, ACTIVATION)
            old_1, new_1 = _move(
                weight_1, momentum_1, new_weight_1, new_momentum_1, new_anchor_1, h, i, width, d_in,
                -(step * e)[:, None] * key[None, :], lasting, retain, real, ends, MOMENTUM, FORGETTING, ANCHORED, WIDE,
            )  # fmt: skip
            x = activate(_along(new_1 if AFTER else old_1, query), ACTIVATION)
        else:
            a = _vector(k, h, width, WIDE)
            x = _vector(q, h, width, WIDE)
        old, new = _move(
            weight_2, momentum_2, new_weight_2, new_momentum_2, new_anchor_2, o, h, d_out, width,
            -(step * error)[:, None] * a[None, :], lasting, retain, real, ends, MOMENTUM, FORGETTING, ANCHORED, WIDE,
        )  # fmt: skip
        z += _along(new if AFTER else old, x)
    if NORM:
        n, _ = normalise(z[None, :], o < d_out, d_out, eps)
        z = _vector(q, o, d_in, WIDE) + tl.sum(n, axis=0) * of_gain
    tl.store(y + at * d_out + o, tl.where(real, z, 0.0), mask=o < d_out)
