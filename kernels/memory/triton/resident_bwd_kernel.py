"""The backward of writing a group of chunks with the state's gradient in registers, in Triton.

The story. What ``memory_write_backward.write_backward_kernel`` does, otherwise: a program walks one row's chunks from
the last to the first, and the gradient of the state after the chunk, weights and momentum of all layers, is in tiles
that the loop over the chunks carries. Of a chunk it reads the state that it started from, what its tokens did, and
what reads have left as gradients of both; a token's own affairs are settled in registers from end to end. What is left
behind are gradients of what came in: of the tokens, and of the state at the very start.

Beside the carried ``PARTS`` tiles of each layer there are the weights that the chunk's gradients were taken at, and
their own gradient: ``PARTS + 2`` in all, which is what ``schedule.held`` counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .loss_kernel import output_error_backward
from .network_kernel import curvature, slope
from .resident_kernel import factor
from .tiles_kernel import dot, gains, keep, load, share, store, tokens


@triton.jit
def _to_mix(to_mix, after, here, part, other):
    """``mix``'s share: ``part`` of the state after the chunk took up ``other`` of the state before it."""
    return to_mix + tl.where(tl.arange(0, 4) == part * 2 + other, 1.0, 0.0).to(to_mix.dtype) * tl.sum(after * here)


@triton.jit
def write_backward_resident_kernel(
    keys, values, gain, mix, write, anchor_1, anchor_2, stack_1, stack_2,
    input_2, hidden_1, hidden_2, raw_1, raw_2, error_1, error_2,
    grad_stack_1, grad_stack_2, grad_keys, grad_input_2, grad_error_1, grad_error_2,
    grad_values, grad_write, grad_mix, grad_gain, grad_anchor_1, grad_anchor_2,
    chunks, rows, b, d_in, width, d_out, clip, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    ANCHORED: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every chunk of one row, the last first. Of the gradients that reads have left, only the first state's grows.

    ``g`` is the gradient of the weights after the chunk, ``r`` that of the momentum. At depth 1 ``grad_input_2`` is the
    keys' gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    i, o, h, four = tl.arange(0, IN), tl.arange(0, OUT), tl.arange(0, WIDTH), tl.arange(0, 4)
    size_1, size_2 = width * d_in, d_out * width
    of_gain = gains(gain, row, o, d_out, OUT, NORM, WIDE)
    to_gain = tl.zeros((OUT,), WIDE)
    last = chunks * rows + row
    g_2 = load(grad_stack_2 + last * PARTS * size_2, o, h, d_out, width, WIDE)
    if LAYERS == 2:
        g_1 = load(grad_stack_1 + last * PARTS * size_1, h, i, width, d_in, WIDE)
    if PARTS == 2:
        r_2 = load(grad_stack_2 + (last * PARTS + 1) * size_2, o, h, d_out, width, WIDE)
        if LAYERS == 2:
            r_1 = load(grad_stack_1 + (last * PARTS + 1) * size_1, h, i, width, d_in, WIDE)
    for done in range(chunks):
        chunk = chunks - 1 - done
        at = chunk * rows + row
        first = at * b
        state_1, state_2 = stack_1 + at * PARTS * size_1, stack_2 + at * PARTS * size_2
        before_1, before_2 = grad_stack_1 + at * PARTS * size_1, grad_stack_2 + at * PARTS * size_2

        # the share of mix, while both states are at hand
        w_2 = load(state_2, o, h, d_out, width, WIDE)
        to_mix = _to_mix(tl.zeros((4,), WIDE), g_2, w_2, 0, 0)
        if LAYERS == 2:
            w_1 = load(state_1, h, i, width, d_in, WIDE)
            to_mix = _to_mix(to_mix, g_1, w_1, 0, 0)
        if PARTS == 2:
            s = load(state_2 + size_2, o, h, d_out, width, WIDE)
            to_mix = _to_mix(_to_mix(_to_mix(to_mix, g_2, s, 0, 1), r_2, w_2, 1, 0), r_2, s, 1, 1)
            if LAYERS == 2:
                s = load(state_1 + size_1, h, i, width, d_in, WIDE)
                to_mix = _to_mix(_to_mix(_to_mix(to_mix, g_1, s, 0, 1), r_1, w_1, 1, 0), r_1, s, 1, 1)
        tl.store(grad_mix + (at * PARTS + four // 2) * PARTS + four % 2, to_mix,
                 mask=(four // 2 < PARTS) & (four % 2 < PARTS))  # fmt: skip
        if ANCHORED:
            w_2 = load(tl.where(chunk == 0, anchor_2 + row * size_2, state_2), o, h, d_out, width, WIDE)
            if LAYERS == 2:
                w_1 = load(tl.where(chunk == 0, anchor_1 + row * size_1, state_1), h, i, width, d_in, WIDE)

        to_w_2 = tl.zeros((OUT, WIDTH), WIDE)
        if LAYERS == 2:
            to_w_1 = tl.zeros((WIDTH, IN), WIDE)
        for t0 in range(0, b, ROWS):
            t = t0 + tl.arange(0, ROWS)
            real = (t < b)[:, None]
            raw = tokens(raw_2, first, t, o, b, d_out, WIDE)
            a = tokens(input_2, first, t, h, b, width, WIDE)
            k = a
            if LAYERS == 2:
                k = tokens(keys, first, t, i, b, d_in, WIDE)
                raw_below = tokens(raw_1, first, t, h, b, width, WIDE)
            error, squares_2 = raw, tl.sum(a * a, axis=1)
            if CLIP:
                error = tokens(error_2, first, t, o, b, d_out, WIDE)

            # through the state after the chunk: mix state - (write errors)^T inputs
            weight = -share(write, first, t, b, 0, PARTS, WIDE)
            felt = dot(a, tl.trans(g_2), OPERAND, WIDE, PRECISION)
            to_weight = -tl.sum(felt * error, axis=1)
            to_error = tokens(grad_error_2, first, t, o, b, d_out, WIDE) + felt * weight
            to_a = tokens(grad_input_2, first, t, h, b, width, WIDE)
            to_a += dot(error * weight, g_2, OPERAND, WIDE, PRECISION)
            if PARTS == 2:
                other = -share(write, first, t, b, 1, PARTS, WIDE)
                felt = dot(a, tl.trans(r_2), OPERAND, WIDE, PRECISION)
                to_other = -tl.sum(felt * error, axis=1)
                to_error += felt * other
                to_a += dot(error * other, r_2, OPERAND, WIDE, PRECISION)
            if LAYERS == 2:
                e = raw_below
                if CLIP:
                    e = tokens(error_1, first, t, h, b, width, WIDE)
                felt_1 = dot(k, tl.trans(g_1), OPERAND, WIDE, PRECISION)
                to_weight -= tl.sum(felt_1 * e, axis=1)
                to_e = tokens(grad_error_1, first, t, h, b, width, WIDE) + felt_1 * weight
                to_k = tokens(grad_keys, first, t, i, b, d_in, WIDE)
                to_k += dot(e * weight, g_1, OPERAND, WIDE, PRECISION)
                if PARTS == 2:
                    felt_1 = dot(k, tl.trans(r_1), OPERAND, WIDE, PRECISION)
                    to_other -= tl.sum(felt_1 * e, axis=1)
                    to_e += felt_1 * other
                    to_k += dot(e * other, r_1, OPERAND, WIDE, PRECISION)
            tl.store(grad_write + (first + t) * PARTS, to_weight, mask=t < b)
            if PARTS == 2:
                tl.store(grad_write + (first + t) * PARTS + 1, to_other, mask=t < b)

            # through errors = scale raw, where scale = clip / |surprise| below one
            squares_raw = tl.sum(raw * raw, axis=1)
            if CLIP:
                square, to_scale = 4 * squares_raw * squares_2, tl.sum(to_error * raw, axis=1)
                if LAYERS == 2:
                    squares_1, squares_k = tl.sum(raw_below * raw_below, axis=1), tl.sum(k * k, axis=1)
                    square += 4 * squares_1 * squares_k
                    to_scale += tl.sum(to_e * raw_below, axis=1)
                scale = clip / tl.maximum(tl.sqrt(square), clip)
                to_square = tl.where(scale < 1, -4 * to_scale * scale / square, 0.0)
                to_error = to_error * scale[:, None] + raw * (to_square * squares_2)[:, None]
                to_a += a * (to_square * squares_raw)[:, None]
                if LAYERS == 2:
                    to_e = to_e * scale[:, None] + raw_below * (to_square * squares_k)[:, None]
                    to_k += k * (to_square * squares_1)[:, None]

            # errors run down the layers, so their gradient runs up ...
            if LAYERS == 2:
                below = tokens(hidden_1, first, t, h, b, width, WIDE)
                rise = slope(below, ACTIVATION)
                pushed = to_e * rise
                to_error += dot(pushed, tl.trans(w_2), OPERAND, WIDE, PRECISION)
                to_w_2 += dot(tl.trans(raw), pushed, OPERAND, WIDE, PRECISION)

            # ... through the loss ...
            g = to_error
            if NORM:
                z = tokens(hidden_2, first, t, o, b, d_out, WIDE)
                v = tokens(values, first, t, o, b, d_out, WIDE)
                g, to_miss, to_gains = output_error_backward(g, raw, z, k, v, of_gain, o < d_out, d_out, eps)
                to_gain += tl.sum(tl.where(real, to_gains, 0.0), axis=0)
                keep(grad_values, first, t, o, b, d_out, -to_miss)
                if LAYERS == 2:  # with a norm, keys are as wide as values
                    to_k += to_miss
                else:
                    to_a += to_miss
            else:
                keep(grad_values, first, t, o, b, d_out, -g)
            g = tl.where(real, g, 0.0)

            # ... and then the inputs' gradient runs down
            to_w_2 += dot(tl.trans(g), a, OPERAND, WIDE, PRECISION)
            to_a += dot(g, w_2, OPERAND, WIDE, PRECISION)
            if LAYERS == 2:
                pulled = dot(raw, w_2, OPERAND, WIDE, PRECISION)
                to_a = tl.where(real, to_a * rise + to_e * pulled * curvature(below, ACTIVATION), 0.0)
                to_w_1 += dot(tl.trans(to_a), k, OPERAND, WIDE, PRECISION)
                to_k += dot(to_a, w_1, OPERAND, WIDE, PRECISION)
                keep(grad_keys, first, t, i, b, d_in, to_k)
            else:
                keep(grad_input_2, first, t, h, b, width, to_a)

        # the weights' own gradient goes to the chunk's start, or to where they were taken from
        if ANCHORED:
            onto_2, high_2 = grad_anchor_2 + row * size_2, tl.where(chunk == 0, d_out, 0)
            store(onto_2, o, h, high_2, width, load(onto_2, o, h, high_2, width, WIDE) + to_w_2)
            to_w_2 = tl.where(chunk == 0, 0.0, to_w_2)
            if LAYERS == 2:
                onto_1, high_1 = grad_anchor_1 + row * size_1, tl.where(chunk == 0, width, 0)
                store(onto_1, h, i, high_1, d_in, load(onto_1, h, i, high_1, d_in, WIDE) + to_w_1)
                to_w_1 = tl.where(chunk == 0, 0.0, to_w_1)

        # the state's, from after the chunk to before it
        keeps = factor(mix, at, 0, 0, PARTS, WIDE)
        to_w_2 += load(before_2, o, h, d_out, width, WIDE) + keeps * g_2
        if LAYERS == 2:
            to_w_1 += load(before_1, h, i, width, d_in, WIDE) + keeps * g_1
        if PARTS == 2:
            adds, turns, lasts = (
                factor(mix, at, 0, 1, PARTS, WIDE),
                factor(mix, at, 1, 0, PARTS, WIDE),
                factor(mix, at, 1, 1, PARTS, WIDE),
            )
            to_w_2 += turns * r_2
            r_2 = load(before_2 + size_2, o, h, d_out, width, WIDE) + adds * g_2 + lasts * r_2
            if LAYERS == 2:
                to_w_1 += turns * r_1
                r_1 = load(before_1 + size_1, h, i, width, d_in, WIDE) + adds * g_1 + lasts * r_1
        g_2 = to_w_2
        if LAYERS == 2:
            g_1 = to_w_1

    store(grad_stack_2 + row * PARTS * size_2, o, h, d_out, width, g_2)
    if LAYERS == 2:
        store(grad_stack_1 + row * PARTS * size_1, h, i, width, d_in, g_1)
    if PARTS == 2:
        store(grad_stack_2 + (row * PARTS + 1) * size_2, o, h, d_out, width, r_2)
        if LAYERS == 2:
            store(grad_stack_1 + (row * PARTS + 1) * size_1, h, i, width, d_in, r_1)
    if NORM:
        tl.store(grad_gain + row * d_out + o, to_gain, mask=o < d_out)
