"""Writing a group of chunks with the state in registers, in Triton: what ``memory_write.write_kernel`` does, otherwise.

The story. A program walks one row (a batch row and a head) through its chunks, and takes the row's state along: weights
and momentum of all layers are whole tiles that the loop over the chunks carries in registers. Of a chunk it reads keys,
values and gates; what it writes it never reads again, so that no step waits for memory that another step filled. Each
chunk's state, and what its tokens did, are left in global memory all the same, where reads and the backward find them.

A chunk's gradients are taken at the weights that it began with, and its tokens come ``ROWS`` at a time: so two
generations of weights are in registers at once, the one that gradients are taken at and the one that they are added to.
That is ``PARTS + 1`` tiles for each layer, and what ``schedule.held`` counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .loss_kernel import output_error
from .network_kernel import activate, slope
from .tiles_kernel import dot, gains, keep, load, share, store, tokens


@triton.jit
def factor(mix, at, part, other, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """What one part of the state at a chunk's start weighs in another at its end."""
    return tl.load(mix + (at * PARTS + part) * PARTS + other).to(WIDE)


@triton.jit
def write_resident_kernel(
    keys, values, gain, mix, write, anchor_1, anchor_2, stack_1, stack_2,
    input_2, hidden_1, hidden_2, raw_1, raw_2, error_1, error_2,
    chunks, rows, b, d_in, width, d_out, clip, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    ANCHORED: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Every chunk of one row. Layers as in ``write_kernel``.

    ``x`` are the weights, ``s`` the momentum, and ``w`` the weights that the chunk's gradients are taken at.
    """
    row = tl.program_id(0).to(tl.int64)
    i, o, h = tl.arange(0, IN), tl.arange(0, OUT), tl.arange(0, WIDTH)
    of_gain = gains(gain, row, o, d_out, OUT, NORM, WIDE)
    size_1, size_2 = width * d_in, d_out * width
    x_2 = load(stack_2 + row * PARTS * size_2, o, h, d_out, width, WIDE)
    w_2 = load(anchor_2 + row * size_2, o, h, d_out, width, WIDE) if ANCHORED else x_2
    if LAYERS == 2:
        x_1 = load(stack_1 + row * PARTS * size_1, h, i, width, d_in, WIDE)
        w_1 = load(anchor_1 + row * size_1, h, i, width, d_in, WIDE) if ANCHORED else x_1
    if PARTS == 2:
        s_2 = load(stack_2 + (row * PARTS + 1) * size_2, o, h, d_out, width, WIDE)
        if LAYERS == 2:
            s_1 = load(stack_1 + (row * PARTS + 1) * size_1, h, i, width, d_in, WIDE)
    for chunk in range(chunks):
        at = chunk * rows + row
        first = at * b

        # the state at the chunk's end, but for what its tokens add
        keeps = factor(mix, at, 0, 0, PARTS, WIDE)
        if PARTS == 2:
            adds, turns, lasts = (
                factor(mix, at, 0, 1, PARTS, WIDE),
                factor(mix, at, 1, 0, PARTS, WIDE),
                factor(mix, at, 1, 1, PARTS, WIDE),
            )
            x_2, s_2 = keeps * x_2 + adds * s_2, turns * x_2 + lasts * s_2
            if LAYERS == 2:
                x_1, s_1 = keeps * x_1 + adds * s_1, turns * x_1 + lasts * s_1
        else:
            x_2 = keeps * x_2
            if LAYERS == 2:
                x_1 = keeps * x_1

        for t0 in range(0, b, ROWS):
            t = t0 + tl.arange(0, ROWS)
            # keys forward
            if LAYERS == 2:
                k = tokens(keys, first, t, i, b, d_in, WIDE)
                below = dot(k, tl.trans(w_1), FINE, WIDE, FINE_PRECISION)
                keep(hidden_1, first, t, h, b, width, below)
                a = activate(below, ACTIVATION)
                keep(input_2, first, t, h, b, width, a)
            else:
                a = tokens(input_2, first, t, h, b, width, WIDE)
                k = a
            z = dot(a, tl.trans(w_2), FINE, WIDE, FINE_PRECISION)
            keep(hidden_2, first, t, o, b, d_out, z)

            # errors back; with a norm, keys are as wide as values
            v = tokens(values, first, t, o, b, d_out, WIDE)
            error = output_error(z, k, v, of_gain, o < d_out, d_out, eps, NORM)
            error = tl.where((t < b)[:, None], error, 0.0)
            keep(raw_2, first, t, o, b, d_out, error)
            if LAYERS == 2:
                e = dot(error, w_2, FINE, WIDE, FINE_PRECISION) * slope(below, ACTIVATION)
                keep(raw_1, first, t, h, b, width, e)
            if CLIP:
                squares = tl.sum(a * a, axis=1) * tl.sum(error * error, axis=1)
                if LAYERS == 2:
                    squares += tl.sum(k * k, axis=1) * tl.sum(e * e, axis=1)
                scale = clip / tl.maximum(tl.sqrt(4 * squares), clip)
                error *= scale[:, None]
                keep(error_2, first, t, o, b, d_out, error)
                if LAYERS == 2:
                    e *= scale[:, None]
                    keep(error_1, first, t, h, b, width, e)

            # what these tokens add: taken away as the opposite, which the matrix unit adds up in place
            adds_w = -share(write, first, t, b, 0, PARTS, WIDE)
            x_2 += dot(tl.trans(error * adds_w), a, OPERAND, WIDE, PRECISION)
            if LAYERS == 2:
                x_1 += dot(tl.trans(e * adds_w), k, OPERAND, WIDE, PRECISION)
            if PARTS == 2:
                adds_s = -share(write, first, t, b, 1, PARTS, WIDE)
                s_2 += dot(tl.trans(error * adds_s), a, OPERAND, WIDE, PRECISION)
                if LAYERS == 2:
                    s_1 += dot(tl.trans(e * adds_s), k, OPERAND, WIDE, PRECISION)

        # the next chunk's state
        w_2 = x_2
        after_2 = stack_2 + (at + rows) * PARTS * size_2
        store(after_2, o, h, d_out, width, x_2)
        if LAYERS == 2:
            w_1 = x_1
            after_1 = stack_1 + (at + rows) * PARTS * size_1
            store(after_1, h, i, width, d_in, x_1)
        if PARTS == 2:
            store(after_2 + size_2, o, h, d_out, width, s_2)
            if LAYERS == 2:
                store(after_1 + size_1, h, i, width, d_in, s_1)
