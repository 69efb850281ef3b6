"""Writing a group of chunks, in Triton: what ``chunk_torch`` does in ``write`` and ``rewrite``.

The story. Writing is sequential: the gradients of a chunk are taken at the weights that the chunk before it left. A
program walks one row (a batch row and a head) through its chunks. Per chunk it runs the keys forward through the
weights and errors back, ``ROWS`` tokens at a time, and then moves the state on by one product with the gates (``mix``)
and one with the errors. The hidden layer is worked through ``BLOCK`` units at a time, so that a program holds a few
tiles of tokens x units and nothing of the state, which streams through the second level of the cache. Each chunk's
start is left behind in global memory, where reads and the backward pass find it.

What the products of the first part lose, a normalised network's Jacobian enlarges, and its derivative does again. In
half precision they are therefore ``FINE``. With bfloat16 there, gradients were off by twice as much.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .loss_kernel import output_error
from .network_kernel import activate, slope
from .tiles_kernel import dot, gains, keep, load, share, store, tokens


@triton.jit
def _differentiate(
    keys, values, w_1, w_2, of_gain, input_2, hidden_1, hidden_2, raw_1, raw_2, error_1, error_2,
    first, t, b, d_in, width, d_out, clip, eps,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, FINE: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Some tokens of a chunk: keys forward through the weights, half errors back."""
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    k = tokens(keys, first, t, i, b, d_in, WIDE)
    v = tokens(values, first, t, o, b, d_out, WIDE)

    # keys forward
    z = tl.zeros((ROWS, OUT), WIDE)
    squares = tl.zeros((ROWS,), WIDE)  # of the last layer's input
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            tile_1 = load(w_1, h, i, width, d_in, WIDE)
            below = dot(k, tl.trans(tile_1), FINE, WIDE, FINE_PRECISION)
            keep(hidden_1, first, t, h, b, width, below)
            a = activate(below, ACTIVATION)
            keep(input_2, first, t, h, b, width, a)
        else:
            a = tokens(input_2, first, t, h, b, width, WIDE)
        squares += tl.sum(a * a, axis=1)
        w = load(w_2, o, h, d_out, width, WIDE)
        z += dot(a, tl.trans(w), FINE, WIDE, FINE_PRECISION)
    keep(hidden_2, first, t, o, b, d_out, z)

    # errors back
    residual = z
    if NORM:
        residual = tokens(keys, first, t, o, b, d_in, WIDE)
    error = output_error(z, residual, v, of_gain, o < d_out, d_out, eps, NORM)
    error = tl.where((t < b)[:, None], error, 0.0)
    keep(raw_2, first, t, o, b, d_out, error)
    squares *= tl.sum(error * error, axis=1)
    if LAYERS == 2:
        tl.debug_barrier()
        pushed = tl.zeros((ROWS,), WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            w = load(w_2, o, h, d_out, width, WIDE)
            below = tokens(hidden_1, first, t, h, b, width, WIDE)
            e = dot(error, w, FINE, WIDE, FINE_PRECISION) * slope(below, ACTIVATION)
            keep(raw_1, first, t, h, b, width, e)
            pushed += tl.sum(e * e, axis=1)
        squares += pushed * tl.sum(k * k, axis=1)
    if CLIP:
        scale = clip / tl.maximum(tl.sqrt(4 * squares), clip)
        keep(error_2, first, t, o, b, d_out, error * scale[:, None])
        if LAYERS == 2:
            tl.debug_barrier()
            for h0 in range(0, width, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                e = tokens(raw_1, first, t, h, b, width, WIDE)
                keep(error_1, first, t, h, b, width, e * scale[:, None])


@triton.jit
def _advance(stack, after, mix, write, errors, inputs, out, width, b, at,
             PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, ROWS: tl.constexpr,
             OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One layer's state after a chunk: ``mix state - (write errors)^T inputs``, tile by tile."""
    first, size = at * b, out * width
    for o0 in range(0, out, BLOCK_OUT):
        o = o0 + tl.arange(0, BLOCK_OUT)
        for i0 in range(0, width, BLOCK_IN):
            i = i0 + tl.arange(0, BLOCK_IN)
            for part in tl.static_range(PARTS):
                total = tl.zeros((BLOCK_OUT, BLOCK_IN), WIDE)
                for t0 in range(0, b, ROWS):
                    t = t0 + tl.arange(0, ROWS)
                    d = tokens(errors, first, t, o, b, out, WIDE) * share(write, first, t, b, part, PARTS, WIDE)
                    a = tokens(inputs, first, t, i, b, width, WIDE)
                    total -= dot(tl.trans(d), a, OPERAND, WIDE, PRECISION)
                for other in tl.static_range(PARTS):
                    factor = tl.load(mix + (at * PARTS + part) * PARTS + other).to(WIDE)
                    total += factor * load(stack + other * size, o, i, out, width, WIDE)
                store(after + part * size, o, i, out, width, total)


@triton.jit
def write_kernel(
    keys, values, gain, mix, write, anchor_1, anchor_2, stack_1, stack_2,
    input_2, hidden_1, hidden_2, raw_1, raw_2, error_1, error_2,
    chunks, rows, b, d_in, width, d_out, clip, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    ANCHORED: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Every chunk of one row. Depth 2: ``d_in -> width -> d_out``.

    Depth 1, ``width -> d_out`` with ``width = d_in``, is layer 2 alone, and ``input_2`` are the keys.
    """
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, OUT)
    of_gain = gains(gain, row, o, d_out, OUT, NORM, WIDE)
    size_1, size_2 = width * d_in, d_out * width
    for chunk in range(chunks):
        at = chunk * rows + row
        first = at * b
        state_1, state_2 = stack_1 + at * PARTS * size_1, stack_2 + at * PARTS * size_2
        w_1, w_2 = state_1, state_2
        if ANCHORED:  # known when compiling, and the rest is not  # noqa: SIM102
            if chunk == 0:
                w_1, w_2 = anchor_1 + row * size_1, anchor_2 + row * size_2
        for t0 in range(0, b, ROWS):
            _differentiate(
                keys, values, w_1, w_2, of_gain, input_2, hidden_1, hidden_2, raw_1, raw_2, error_1, error_2,
                first, t0 + tl.arange(0, ROWS), b, d_in, width, d_out, clip, eps,
                LAYERS, ACTIVATION, NORM, CLIP, ROWS, IN, OUT, BLOCK, WIDE, FINE, FINE_PRECISION,
            )  # fmt: skip
        tl.debug_barrier()

        # the state on
        later = (at + rows) * PARTS
        next_1, next_2 = stack_1 + later * size_1, stack_2 + later * size_2
        if LAYERS == 2:
            _advance(state_1, next_1, mix, write, error_1, keys, width, d_in, b, at,
                     PARTS, BLOCK, IN, ROWS, OPERAND, WIDE, PRECISION)  # fmt: skip
        _advance(state_2, next_2, mix, write, error_2, input_2, d_out, width, b, at,
                 PARTS, OUT, BLOCK, ROWS, OPERAND, WIDE, PRECISION)  # fmt: skip
        tl.debug_barrier()


@triton.jit
def rewrite_kernel(
    keys, values, gain, anchor_1, anchor_2, stack_1, stack_2,
    input_2, hidden_1, hidden_2, raw_1, raw_2, error_1, error_2,
    rows, b, d_in, width, d_out, clip, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    ANCHORED: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, FINE: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """What ``write_kernel`` leaves behind for ``ROWS`` tokens, from the states that are known: in no order."""
    at = tl.program_id(0).to(tl.int64)  # chunk * rows + row
    row, o = at % rows, tl.arange(0, OUT)
    of_gain = gains(gain, row, o, d_out, OUT, NORM, WIDE)
    w_1, w_2 = stack_1 + at * PARTS * width * d_in, stack_2 + at * PARTS * d_out * width
    if ANCHORED:  # known when compiling, and the rest is not  # noqa: SIM102
        if at < rows:
            w_1, w_2 = anchor_1 + row * width * d_in, anchor_2 + row * d_out * width
    _differentiate(
        keys, values, w_1, w_2, of_gain, input_2, hidden_1, hidden_2, raw_1, raw_2, error_1, error_2,
        at * b, tl.program_id(1) * ROWS + tl.arange(0, ROWS), b, d_in, width, d_out, clip, eps,
        LAYERS, ACTIVATION, NORM, CLIP, ROWS, IN, OUT, BLOCK, WIDE, FINE, FINE_PRECISION,
    )  # fmt: skip
