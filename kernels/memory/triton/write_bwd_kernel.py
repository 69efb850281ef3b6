"""The backward of writing a group of chunks, in Triton: what ``chunk_torch`` does in ``write_backward``.

The story. A program walks one row's chunks from the last to the first. A write contains a gradient, so its backward is
of second order: from the state after the chunk to errors and inputs; then up the layers, for errors ran down; through
the loss; and down the layers again. All of this is each token's own affair, and ``ROWS`` tokens are worked on at a
time. What remains is what tokens have in common: a last pass adds up the gradient of the weights, tile by tile, and
takes the gradient of the state from after the chunk to before it.

``grad_error`` are overwritten on the way with what each layer's output is due, and ``grad_input_2`` with the same of
the hidden layer, for the last pass to multiply.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .loss_kernel import output_error_backward
from .network_kernel import curvature, slope
from .tiles_kernel import dot, gains, keep, load, share, store, tokens


@triton.jit
def _pull_state(mix, to_mix, at, start, later, before, r, c, rows_of, columns, size,
                PARTS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A tile of the state before a chunk: gets what the state after it was due through ``mix``; and ``mix``'s share."""
    four = tl.arange(0, 4)
    for part in tl.static_range(PARTS):
        total = load(before + part * size, r, c, rows_of, columns, WIDE)
        here = load(start + part * size, r, c, rows_of, columns, WIDE)
        for other in tl.static_range(PARTS):
            after = load(later + other * size, r, c, rows_of, columns, WIDE)
            total += tl.load(mix + (at * PARTS + other) * PARTS + part).to(WIDE) * after
            to_mix += tl.where(four == other * 2 + part, 1.0, 0.0).to(WIDE) * tl.sum(after * here)
        store(before + part * size, r, c, rows_of, columns, total)
    return to_mix


@triton.jit
def _over_tokens(onto, left, right, first, r, c, b, rows_of, columns,
                 ROWS: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``onto + left^T right``: a tile of a layer's gradient."""
    for t0 in range(0, b, ROWS):
        t = t0 + tl.arange(0, ROWS)
        x, y = tokens(left, first, t, r, b, rows_of, WIDE), tokens(right, first, t, c, b, columns, WIDE)
        onto += dot(tl.trans(x), y, OPERAND, WIDE, PRECISION)
    return onto


@triton.jit
def write_backward_kernel(
    keys, values, gain, mix, write, anchor_1, anchor_2, stack_1, stack_2,
    input_2, hidden_1, hidden_2, raw_1, raw_2, error_1, error_2,
    grad_stack_1, grad_stack_2, grad_keys, grad_input_2, grad_error_1, grad_error_2,
    grad_values, grad_write, grad_mix, grad_gain, grad_anchor_1, grad_anchor_2,
    chunks, rows, b, d_in, width, d_out, clip, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    ANCHORED: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every chunk of one row, the last first. The gradients that reads have left are added to where they lie."""
    row = tl.program_id(0).to(tl.int64)
    i, o, four = tl.arange(0, IN), tl.arange(0, OUT), tl.arange(0, 4)
    size_1, size_2 = width * d_in, d_out * width
    of_gain = gains(gain, row, o, d_out, OUT, NORM, WIDE)
    to_gain = tl.zeros((OUT,), WIDE)
    for done in range(chunks):
        chunk = chunks - 1 - done
        at = chunk * rows + row
        first = at * b
        state_1, state_2 = stack_1 + at * PARTS * size_1, stack_2 + at * PARTS * size_2
        before_1, before_2 = grad_stack_1 + at * PARTS * size_1, grad_stack_2 + at * PARTS * size_2
        later = (at + rows) * PARTS
        later_1, later_2 = grad_stack_1 + later * size_1, grad_stack_2 + later * size_2
        w_1, w_2, onto_1, onto_2 = state_1, state_2, before_1, before_2
        if ANCHORED:  # known when compiling, and the rest is not  # noqa: SIM102
            if chunk == 0:
                w_1, w_2 = anchor_1 + row * size_1, anchor_2 + row * size_2
                onto_1, onto_2 = grad_anchor_1 + row * size_1, grad_anchor_2 + row * size_2
        for t0 in range(0, b, ROWS):
            t = t0 + tl.arange(0, ROWS)
            real = (t < b)[:, None]

            # through the state after the chunk: mix state - (write errors)^T inputs
            error = tokens(error_2, first, t, o, b, d_out, WIDE)
            to_error = tokens(grad_error_2, first, t, o, b, d_out, WIDE)
            for part in tl.static_range(PARTS):
                weight = share(write, first, t, b, part, PARTS, WIDE)
                to_weight = tl.zeros((ROWS,), WIDE)
                felt = tl.zeros((ROWS, OUT), WIDE)
                for h0 in range(0, width, BLOCK):
                    h = h0 + tl.arange(0, BLOCK)
                    after_2 = load(later_2 + part * size_2, o, h, d_out, width, WIDE)
                    a = tokens(input_2, first, t, h, b, width, WIDE)
                    felt += dot(a, tl.trans(after_2), OPERAND, WIDE, PRECISION)
                    to_a = tokens(grad_input_2, first, t, h, b, width, WIDE)
                    to_a -= dot(error * weight, after_2, OPERAND, WIDE, PRECISION)
                    keep(grad_input_2, first, t, h, b, width, to_a)
                if LAYERS == 2:
                    k = tokens(keys, first, t, i, b, d_in, WIDE)
                    to_k = tokens(grad_keys, first, t, i, b, d_in, WIDE)
                    for h0 in range(0, width, BLOCK):
                        h = h0 + tl.arange(0, BLOCK)
                        after_1 = load(later_1 + part * size_1, h, i, width, d_in, WIDE)
                        e = tokens(error_1, first, t, h, b, width, WIDE)
                        felt_1 = dot(k, tl.trans(after_1), OPERAND, WIDE, PRECISION)
                        to_weight -= tl.sum(felt_1 * e, axis=1)
                        to_e = tokens(grad_error_1, first, t, h, b, width, WIDE)
                        keep(grad_error_1, first, t, h, b, width, to_e - felt_1 * weight)
                        to_k -= dot(e * weight, after_1, OPERAND, WIDE, PRECISION)
                    keep(grad_keys, first, t, i, b, d_in, to_k)
                to_error -= felt * weight
                to_weight -= tl.sum(felt * error, axis=1)
                tl.store(grad_write + (first + t) * PARTS + part, to_weight, mask=t < b)
                tl.debug_barrier()

            # through errors = scale raw, where scale = clip / |surprise| below one
            raw = tokens(raw_2, first, t, o, b, d_out, WIDE)
            squares_raw = tl.sum(raw * raw, axis=1)
            squares_k, squares_1 = tl.zeros((ROWS,), WIDE), tl.zeros((ROWS,), WIDE)  # of keys and of raw_1
            to_square = tl.zeros((ROWS,), WIDE)
            if CLIP:
                squares_2, to_scale = tl.zeros((ROWS,), WIDE), tl.sum(to_error * raw, axis=1)
                for h0 in range(0, width, BLOCK):
                    h = h0 + tl.arange(0, BLOCK)
                    a = tokens(input_2, first, t, h, b, width, WIDE)
                    squares_2 += tl.sum(a * a, axis=1)
                    if LAYERS == 2:
                        e = tokens(raw_1, first, t, h, b, width, WIDE)
                        squares_1 += tl.sum(e * e, axis=1)
                        to_scale += tl.sum(tokens(grad_error_1, first, t, h, b, width, WIDE) * e, axis=1)
                square = 4 * squares_raw * squares_2
                if LAYERS == 2:
                    k = tokens(keys, first, t, i, b, d_in, WIDE)
                    squares_k = tl.sum(k * k, axis=1)
                    square += 4 * squares_1 * squares_k
                scale = clip / tl.maximum(tl.sqrt(square), clip)
                to_square = tl.where(scale < 1, -4 * to_scale * scale / square, 0.0)
                to_error = to_error * scale[:, None] + raw * (to_square * squares_2)[:, None]

            # errors run down the layers, so their gradient runs up ...
            if LAYERS == 2:
                for h0 in range(0, width, BLOCK):
                    h = h0 + tl.arange(0, BLOCK)
                    to_e = tokens(grad_error_1, first, t, h, b, width, WIDE)
                    if CLIP:
                        e = tokens(raw_1, first, t, h, b, width, WIDE)
                        to_e = to_e * scale[:, None] + e * (to_square * squares_k)[:, None]
                        keep(grad_error_1, first, t, h, b, width, to_e)
                    below = tokens(hidden_1, first, t, h, b, width, WIDE)
                    w = load(w_2, o, h, d_out, width, WIDE)
                    to_error += dot(to_e * slope(below, ACTIVATION), tl.trans(w), OPERAND, WIDE, PRECISION)

            # ... through the loss ...
            g = to_error
            if NORM:
                z = tokens(hidden_2, first, t, o, b, d_out, WIDE)
                v = tokens(values, first, t, o, b, d_out, WIDE)
                residual = tokens(keys, first, t, o, b, d_in, WIDE)
                g, to_miss, to_gains = output_error_backward(
                    to_error, raw, z, residual, v, of_gain, o < d_out, d_out, eps
                )
                to_gain += tl.sum(tl.where(real, to_gains, 0.0), axis=0)
                keep(grad_values, first, t, o, b, d_out, -to_miss)
                # a residual network is as wide at its end as at its beginning
                to_residual = tokens(grad_keys, first, t, o, b, d_in, WIDE) + to_miss
                tl.debug_barrier()
                keep(grad_keys, first, t, o, b, d_in, to_residual)
            else:
                keep(grad_values, first, t, o, b, d_out, -g)
            g = tl.where(real, g, 0.0)
            keep(grad_error_2, first, t, o, b, d_out, g)
            tl.debug_barrier()

            # ... and then the inputs' gradient runs down
            if LAYERS == 2:
                to_k = tokens(grad_keys, first, t, i, b, d_in, WIDE)
                if CLIP:
                    k = tokens(keys, first, t, i, b, d_in, WIDE)
                    to_k += k * (to_square * squares_1)[:, None]
            for h0 in range(0, width, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                w = load(w_2, o, h, d_out, width, WIDE)
                to_a = tokens(grad_input_2, first, t, h, b, width, WIDE) + dot(g, w, OPERAND, WIDE, PRECISION)
                if CLIP:
                    a = tokens(input_2, first, t, h, b, width, WIDE)
                    to_a += a * (to_square * squares_raw)[:, None]
                if LAYERS == 2:
                    below = tokens(hidden_1, first, t, h, b, width, WIDE)
                    to_e = tokens(grad_error_1, first, t, h, b, width, WIDE)
                    rise = slope(below, ACTIVATION)
                    pulled = dot(raw, w, OPERAND, WIDE, PRECISION)
                    to_a = tl.where(real, to_a * rise + to_e * pulled * curvature(below, ACTIVATION), 0.0)
                    tile_1 = load(w_1, h, i, width, d_in, WIDE)
                    to_k += dot(to_a, tile_1, OPERAND, WIDE, PRECISION)
                    keep(grad_error_1, first, t, h, b, width, to_e * rise)
                keep(grad_input_2, first, t, h, b, width, to_a)
            if LAYERS == 2:
                keep(grad_keys, first, t, i, b, d_in, to_k)
            tl.debug_barrier()

        # what the chunk's tokens have in common
        to_mix = tl.zeros((4,), WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            to_mix = _pull_state(mix, to_mix, at, state_2, later_2, before_2, o, h, d_out, width, size_2, PARTS, WIDE)
            if LAYERS == 2:
                to_mix = _pull_state(mix, to_mix, at, state_1, later_1, before_1, h, i, width, d_in, size_1,
                                     PARTS, WIDE)  # fmt: skip
            tl.debug_barrier()
            to_w = load(onto_2, o, h, d_out, width, WIDE)
            to_w = _over_tokens(to_w, grad_error_2, input_2, first, o, h, b, d_out, width,
                                ROWS, OPERAND, WIDE, PRECISION)  # fmt: skip
            if LAYERS == 2:
                to_w = _over_tokens(to_w, raw_2, grad_error_1, first, o, h, b, d_out, width,
                                    ROWS, OPERAND, WIDE, PRECISION)  # fmt: skip
                to_w_1 = load(onto_1, h, i, width, d_in, WIDE)
                to_w_1 = _over_tokens(to_w_1, grad_input_2, keys, first, h, i, b, width, d_in,
                                      ROWS, OPERAND, WIDE, PRECISION)  # fmt: skip
                store(onto_1, h, i, width, d_in, to_w_1)
            store(onto_2, o, h, d_out, width, to_w)
        tl.store(grad_mix + (at * PARTS + four // 2) * PARTS + four % 2, to_mix,
                 mask=(four // 2 < PARTS) & (four % 2 < PARTS))  # fmt: skip
        tl.debug_barrier()
    if NORM:
        tl.store(grad_gain + row * d_out + o, to_gain, mask=o < d_out)
