"""The backward of reading a group of chunks, in Triton, in two launches that have no order among their programs.

The story. The first is the queries' side: ``ROWS`` queries of one chunk of one row take the gradient of their answers
down the layers. It leaves behind what the other side multiplies: the gradient of each layer's output (``pushed``), and,
for every query and key, the weighted scores (``decayed``) and the gradient of the scores (``felt``) of each layer. The
second is the other side: for keys, errors and states, sums over the chunk's queries of products with these, one matrix
product for each, a tile at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .network_kernel import activate, normalise, pull, slope
from .tiles_kernel import dot, gains, keep, load, of_part, share, store, tokens


@triton.jit
def read_backward_kernel(
    grad_y, queries, keys, gain, weigh, carry, stack_1, stack_2, input_2, error_1, error_2, asked_1, asked_2,
    grad_queries, grad_weigh, grad_carry, grad_gain,
    pushed_1, pushed_2, decayed_1, decayed_2, felt_1, felt_2,
    rows, b, d_in, width, d_out, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' side: ``ROWS`` queries, given each layer's outputs ``asked``. Layers as in ``read_kernel``."""
    at = tl.program_id(0).to(tl.int64)  # chunk * rows + row
    first = at * b
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i, o, p = tl.arange(0, IN), tl.arange(0, OUT), tl.arange(0, 2)
    size_1, size_2 = width * d_in, d_out * width
    g = tokens(grad_y, first, t, o, b, d_out, WIDE)
    if NORM:
        n, inverse = normalise(tokens(asked_2, first, t, o, b, d_out, WIDE), o < d_out, d_out, eps)
        place = (at * tl.num_programs(1) + tl.program_id(1)) * d_out + o
        tl.store(grad_gain + place, tl.sum(g * n, axis=0), mask=o < d_out)
        of_gain = gains(gain, at % rows, o, d_out, OUT, NORM, WIDE)
        g = pull(g * of_gain[None, :], n, inverse, o < d_out, d_out)
    keep(pushed_2, first, t, o, b, d_out, g)

    # the last layer's scores
    for s0 in range(0, b, KEYS):
        s = s0 + tl.arange(0, KEYS)
        scores = tl.zeros((ROWS, KEYS), WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            x = activate(tokens(asked_1, first, t, h, b, width, WIDE), ACTIVATION)
            a = tokens(input_2, first, s, h, b, width, WIDE)
            scores += dot(x, tl.trans(a), OPERAND, WIDE, PRECISION)
        decay = tokens(weigh, first, t, s, b, b, WIDE)
        error = tokens(error_2, first, s, o, b, d_out, WIDE)
        to_decayed = -dot(g, tl.trans(error), OPERAND, WIDE, PRECISION)
        keep(grad_weigh, first, t, s, b, b, to_decayed * scores)
        keep(decayed_2, first, t, s, b, b, scores * decay)
        keep(felt_2, first, t, s, b, b, to_decayed * decay)
    tl.debug_barrier()

    # down through the last layer, and through the state below it
    to_carry = tl.zeros((ROWS, 2), WIDE)
    to_q = tl.zeros((ROWS, IN), WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        below = tokens(asked_1, first, t, h, b, width, WIDE)
        x = activate(below, ACTIVATION)
        to_x = tl.zeros((ROWS, BLOCK), WIDE)
        for s0 in range(0, b, KEYS):
            s = s0 + tl.arange(0, KEYS)
            felt = tokens(felt_2, first, t, s, b, b, WIDE)
            to_x += dot(felt, tokens(input_2, first, s, h, b, width, WIDE), OPERAND, WIDE, PRECISION)
        for part in tl.static_range(PARTS):
            w = load(stack_2 + (at * PARTS + part) * size_2, o, h, d_out, width, WIDE)
            back = dot(g, w, OPERAND, WIDE, PRECISION)
            to_carry += of_part(tl.sum(x * back, axis=1), part, WIDE)
            to_x += share(carry, first, t, b, part, PARTS, WIDE) * back
        if LAYERS == 1:
            if NORM:
                to_x += tokens(grad_y, first, t, h, b, d_out, WIDE)
            keep(grad_queries, first, t, h, b, width, to_x)
        else:
            to_below = to_x * slope(below, ACTIVATION)
            keep(pushed_1, first, t, h, b, width, to_below)
            q = tokens(queries, first, t, i, b, d_in, WIDE)
            for part in tl.static_range(PARTS):
                w_1 = load(stack_1 + (at * PARTS + part) * size_1, h, i, width, d_in, WIDE)
                back_1 = dot(to_below, w_1, OPERAND, WIDE, PRECISION)
                to_carry += of_part(tl.sum(q * back_1, axis=1), part, WIDE)
                to_q += share(carry, first, t, b, part, PARTS, WIDE) * back_1
    tl.store(grad_carry + (first + t[:, None]) * PARTS + p[None, :], to_carry,
             mask=(t < b)[:, None] & (p < PARTS)[None, :])  # fmt: skip

    # the first layer's scores
    if LAYERS == 2:
        tl.debug_barrier()
        q = tokens(queries, first, t, i, b, d_in, WIDE)
        for s0 in range(0, b, KEYS):
            s = s0 + tl.arange(0, KEYS)
            to_decayed = tl.zeros((ROWS, KEYS), WIDE)
            for h0 in range(0, width, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                to_below = tokens(pushed_1, first, t, h, b, width, WIDE)
                e = tokens(error_1, first, s, h, b, width, WIDE)
                to_decayed -= dot(to_below, tl.trans(e), OPERAND, WIDE, PRECISION)
            k = tokens(keys, first, s, i, b, d_in, WIDE)
            scores = dot(q, tl.trans(k), OPERAND, WIDE, PRECISION)
            decay = tokens(weigh, first, t, s, b, b, WIDE)
            to_weigh = tokens(grad_weigh, first, t, s, b, b, WIDE) + to_decayed * scores
            keep(grad_weigh, first, t, s, b, b, to_weigh)
            keep(decayed_1, first, t, s, b, b, scores * decay)
            felt = to_decayed * decay
            keep(felt_1, first, t, s, b, b, felt)
            to_q += dot(felt, k, OPERAND, WIDE, PRECISION)
        if NORM:
            to_q += tokens(grad_y, first, t, i, b, d_out, WIDE)
        keep(grad_queries, first, t, i, b, d_in, to_q)


@triton.jit
def _over_queries(matrix, x, first, s, column, b, columns,
                  ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr,
                  OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``matrix^T activate(x)`` at some keys, ``matrix`` being of queries and keys."""
    total = tl.zeros((KEYS, COLUMNS), WIDE)
    for t0 in range(0, b, ROWS):
        t = t0 + tl.arange(0, ROWS)
        left = tokens(matrix, first, t, s, b, b, WIDE)
        right = activate(tokens(x, first, t, column, b, columns, WIDE), ACTIVATION)
        total += dot(tl.trans(left), right, OPERAND, WIDE, PRECISION)
    return total


@triton.jit
def _to_state(pushed, x, carry, first, part, r, c, b, rows_of, columns,
              PARTS: tl.constexpr, ROWS: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr,
              ACTIVATION: tl.constexpr,
              OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``(carry pushed)^T activate(x)``: a tile of the gradient of one part of a layer's state."""
    total = tl.zeros((HIGH, WIDTH), WIDE)
    for t0 in range(0, b, ROWS):
        t = t0 + tl.arange(0, ROWS)
        left = tokens(pushed, first, t, r, b, rows_of, WIDE) * share(carry, first, t, b, part, PARTS, WIDE)
        right = activate(tokens(x, first, t, c, b, columns, WIDE), ACTIVATION)
        total += dot(tl.trans(left), right, OPERAND, WIDE, PRECISION)
    return total


@triton.jit
def read_backward_state_kernel(
    queries, carry, asked_1, pushed_1, pushed_2, decayed_1, decayed_2, felt_1, felt_2,
    grad_keys, grad_input_2, grad_error_1, grad_error_2, grad_stack_1, grad_stack_2,
    b, d_in, width, d_out,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The other side, of one chunk of one row. At depth 1 ``grad_input_2`` is the keys' gradient."""
    at = tl.program_id(0).to(tl.int64)  # chunk * rows + row
    first = at * b
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    size_1, size_2 = width * d_in, d_out * width
    for s0 in range(0, b, KEYS):
        s = s0 + tl.arange(0, KEYS)
        to_error = -_over_queries(decayed_2, pushed_2, first, s, o, b, d_out,
                                  ROWS, KEYS, OUT, 0, OPERAND, WIDE, PRECISION)  # fmt: skip
        keep(grad_error_2, first, s, o, b, d_out, to_error)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            to_input = _over_queries(felt_2, asked_1, first, s, h, b, width,
                                     ROWS, KEYS, BLOCK, ACTIVATION, OPERAND, WIDE, PRECISION)  # fmt: skip
            keep(grad_input_2, first, s, h, b, width, to_input)
            if LAYERS == 2:
                to_error_1 = -_over_queries(decayed_1, pushed_1, first, s, h, b, width,
                                            ROWS, KEYS, BLOCK, 0, OPERAND, WIDE, PRECISION)  # fmt: skip
                keep(grad_error_1, first, s, h, b, width, to_error_1)
        if LAYERS == 2:
            to_key = _over_queries(felt_1, queries, first, s, i, b, d_in,
                                   ROWS, KEYS, IN, 0, OPERAND, WIDE, PRECISION)  # fmt: skip
            keep(grad_keys, first, s, i, b, d_in, to_key)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        for part in tl.static_range(PARTS):
            tile = _to_state(pushed_2, asked_1, carry, first, part, o, h, b, d_out, width,
                             PARTS, ROWS, OUT, BLOCK, ACTIVATION, OPERAND, WIDE, PRECISION)  # fmt: skip
            store(grad_stack_2 + (at * PARTS + part) * size_2, o, h, d_out, width, tile)
            if LAYERS == 2:
                tile_1 = _to_state(pushed_1, queries, carry, first, part, h, i, b, width, d_in,
                                   PARTS, ROWS, BLOCK, IN, 0, OPERAND, WIDE, PRECISION)  # fmt: skip
                store(grad_stack_1 + (at * PARTS + part) * size_1, h, i, width, d_in, tile_1)
