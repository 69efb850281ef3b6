"""The neural memory in Triton: writing a group of chunks, and reading it, as ``memory.chunk_network`` does in PyTorch.

Writing is sequential: the gradients of a chunk are taken at the weights that the chunk before it left. A program walks
one row (a batch row and a head) through its chunks. Per chunk it runs the keys forward through the weights, errors
back, and moves the state on by one product with the gates (``mix``) and one with the errors. The hidden layer is worked
through ``BLOCK`` units at a time, so that a program holds a few tiles of tokens x ``BLOCK`` and nothing of the state,
which streams through the second level of the cache. Each chunk's start is left behind in global memory, where reads and
the backward pass find it.

Reading has no order: a program answers the queries of one chunk of one row, at the state that chunk started from and
with what the chunk itself has written so far, one decay-weighted product of scores as in attention.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(x, row, column, rows, columns, wide: tl.constexpr):
    """A tile of a matrix of ``columns`` columns; zeros outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(wide)


@triton.jit
def _store(x, row, column, rows, columns, values):
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(x + row[:, None] * columns + column[None, :], values, mask=inside)


@triton.jit
def _dot(a, b, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION, out_dtype=WIDE)


# -- the network -------------------------------------------------------------------------------------------------------

IDENTITY, RELU, SILU, GELU = (tl.constexpr(i) for i in range(4))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        z = tl.maximum(z, 0.0)
    elif ACTIVATION == SILU:
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == GELU:
        z = z * 0.5 * (1 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        slope = tl.where(z > 0, 1.0, 0.0).to(z.dtype)
    elif ACTIVATION == SILU:
        s = 1 / (1 + tl.exp(-z))
        slope = s + z * s * (1 - s)
    elif ACTIVATION == GELU:
        slope = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        slope = tl.full(z.shape, 1.0, z.dtype)
    return slope


@triton.jit
def _normalise(z, inside, width, eps):
    """``(z - mean) / sigma`` over the columns that are inside, and ``1 / sigma``."""
    mean = tl.sum(z, axis=1)[:, None] / width
    centred = tl.where(inside[None, :], z - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=1)[:, None] / width + eps)
    return centred * inverse, inverse


@triton.jit
def _pull(g, n, inverse, inside, width):
    """The vector-Jacobian product of ``_normalise``."""
    g_mean = tl.sum(g, axis=1)[:, None] / width
    along = tl.sum(g * n, axis=1)[:, None] / width
    return tl.where(inside[None, :], (g - g_mean - n * along) * inverse, 0.0)


# -- writing -----------------------------------------------------------------------------------------------------------


@triton.jit
def _advance(stack, after, mix, write, row_mask, errors, inputs, first, out, width, b, chunk_row,
             PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, TIME: tl.constexpr,
             OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One layer's state after a chunk: ``mix state - (write errors)^T inputs``, tile by tile."""
    t = tl.arange(0, TIME)
    size = out * width
    for o0 in range(0, out, BLOCK_OUT):
        o = o0 + tl.arange(0, BLOCK_OUT)
        d = _load(errors, t, o, b, out, WIDE)
        for i0 in range(0, width, BLOCK_IN):
            i = i0 + tl.arange(0, BLOCK_IN)
            a = _load(inputs, t, i, b, width, WIDE)
            for part in tl.static_range(PARTS):
                share = tl.load(write + (chunk_row * b + t) * PARTS + part, mask=t < b, other=0.0).to(WIDE)
                total = -_dot(tl.trans(d * share[:, None]), a, OPERAND, WIDE, PRECISION)
                for other in tl.static_range(PARTS):
                    factor = tl.load(mix + (chunk_row * PARTS + part) * PARTS + other).to(WIDE)
                    total += factor * _load(stack + other * size, o, i, out, width, WIDE)
                _store(after + part * size, o, i, out, width, total)


@triton.jit
def write_kernel(
    keys, values, gain, mix, write, anchor_1, anchor_2, stack_1, stack_2,
    input_2, hidden_1, hidden_2, raw_1, raw_2, error_1, error_2,
    chunks, rows, b, d_in, width, d_out, clip, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    ANCHORED: tl.constexpr, TIME: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every chunk of one row. Depth 2: ``d_in -> width -> d_out``; depth 1: ``d_in -> d_out``, in layer 2's place."""
    row = tl.program_id(0).to(tl.int64)
    t, i, o = tl.arange(0, TIME), tl.arange(0, IN), tl.arange(0, OUT)
    of_gain = tl.full((OUT,), 1.0, WIDE)
    if NORM:
        of_gain = tl.load(gain + row * d_out + o, mask=o < d_out, other=0.0).to(WIDE)
    size_1, size_2 = width * d_in, d_out * width
    for chunk in range(chunks):
        at = chunk * rows + row
        k = _load(keys + at * b * d_in, t, i, b, d_in, WIDE)
        v = _load(values + at * b * d_out, t, o, b, d_out, WIDE)
        state_1, state_2 = stack_1 + at * PARTS * size_1, stack_2 + at * PARTS * size_2
        w_1, w_2 = state_1, state_2
        if ANCHORED:  # known when compiling, and the rest is not  # noqa: SIM102
            if chunk == 0:
                w_1, w_2 = anchor_1 + row * size_1, anchor_2 + row * size_2

        # keys forward
        z = tl.zeros((TIME, OUT), WIDE)
        squares = tl.zeros((TIME,), WIDE)  # of the last layer's input
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            if LAYERS == 2:
                tile_1 = _load(w_1, h, i, width, d_in, WIDE)
                below = _dot(k, tl.trans(tile_1), OPERAND, WIDE, PRECISION)
                _store(hidden_1 + at * b * width, t, h, b, width, below)
                a = _activate(below, ACTIVATION)
                _store(input_2 + at * b * width, t, h, b, width, a)
            else:
                a = _load(keys + at * b * d_in, t, h, b, d_in, WIDE)
            squares += tl.sum(a * a, axis=1)
            w = _load(w_2, o, h, d_out, width, WIDE)
            z += _dot(a, tl.trans(w), OPERAND, WIDE, PRECISION)
        _store(hidden_2 + at * b * d_out, t, o, b, d_out, z)

        # errors back
        if NORM:
            n, inverse = _normalise(z, o < d_out, d_out, eps)
            residual = _load(keys + at * b * d_in, t, o, b, d_in, WIDE)
            error = _pull((residual + n * of_gain[None, :] - v) * of_gain[None, :], n, inverse, o < d_out, d_out)
        else:
            error = z - v
        error = tl.where((t < b)[:, None], error, 0.0)
        _store(raw_2 + at * b * d_out, t, o, b, d_out, error)
        squares *= tl.sum(error * error, axis=1)
        tl.debug_barrier()
        if LAYERS == 2:
            pushed = tl.zeros((TIME,), WIDE)
            for h0 in range(0, width, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                w = _load(w_2, o, h, d_out, width, WIDE)
                below = _load(hidden_1 + at * b * width, t, h, b, width, WIDE)
                e = _dot(error, w, OPERAND, WIDE, PRECISION) * _slope(below, ACTIVATION)
                _store(raw_1 + at * b * width, t, h, b, width, e)
                pushed += tl.sum(e * e, axis=1)
            squares += pushed * tl.sum(k * k, axis=1)
            tl.debug_barrier()
        if CLIP:
            scale = clip / tl.maximum(tl.sqrt(4 * squares), clip)
            _store(error_2 + at * b * d_out, t, o, b, d_out, error * scale[:, None])
            if LAYERS == 2:
                for h0 in range(0, width, BLOCK):
                    h = h0 + tl.arange(0, BLOCK)
                    e = _load(raw_1 + at * b * width, t, h, b, width, WIDE)
                    _store(error_1 + at * b * width, t, h, b, width, e * scale[:, None])
            tl.debug_barrier()

        # the state on
        next_1, next_2 = state_1 + rows * PARTS * size_1, state_2 + rows * PARTS * size_2
        last_input = input_2 + at * b * width
        if LAYERS == 1:
            last_input = keys + at * b * d_in
        else:
            _advance(state_1, next_1, mix, write, t < b, error_1 + at * b * width, keys + at * b * d_in, 0, width, d_in,
                     b, at, PARTS, BLOCK, IN, TIME, OPERAND, WIDE, PRECISION)  # fmt: skip
        _advance(state_2, next_2, mix, write, t < b, error_2 + at * b * d_out, last_input, 0, d_out, width,
                 b, at, PARTS, OUT, BLOCK, TIME, OPERAND, WIDE, PRECISION)  # fmt: skip
        tl.debug_barrier()


# -- reading -----------------------------------------------------------------------------------------------------------


@triton.jit
def read_kernel(
    queries, keys, gain, weigh, carry, stack_1, stack_2, input_2, error_1, error_2, y, asked_1, asked_2,
    rows, b, d_in, width, d_out, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
    TIME: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All queries of one chunk of one row, each at the weights that its token left. Layers as in ``write_kernel``."""
    at = tl.program_id(0).to(tl.int64)  # chunk * rows + row
    row = at % rows
    t, i, o = tl.arange(0, TIME), tl.arange(0, IN), tl.arange(0, OUT)
    size_1, size_2 = width * d_in, d_out * width
    q = _load(queries + at * b * d_in, t, i, b, d_in, WIDE)
    decay = _load(weigh + at * b * b, t, t, b, b, WIDE)
    if LAYERS == 2:
        k = _load(keys + at * b * d_in, t, i, b, d_in, WIDE)
        decayed = _dot(q, tl.trans(k), OPERAND, WIDE, PRECISION) * decay
    z = tl.zeros((TIME, OUT), WIDE)
    scores = tl.zeros((TIME, TIME), WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            e = _load(error_1 + at * b * width, t, h, b, width, WIDE)
            below = -_dot(decayed, e, OPERAND, WIDE, PRECISION)
            for part in tl.static_range(PARTS):
                share = tl.load(carry + (at * b + t) * PARTS + part, mask=t < b, other=0.0).to(WIDE)[:, None]
                w_1 = _load(stack_1 + (at * PARTS + part) * size_1, h, i, width, d_in, WIDE)
                below += share * _dot(q, tl.trans(w_1), OPERAND, WIDE, PRECISION)
            if KEEP:
                _store(asked_1 + at * b * width, t, h, b, width, below)
            x = _activate(below, ACTIVATION)
            a = _load(input_2 + at * b * width, t, h, b, width, WIDE)
        else:
            x = _load(queries + at * b * d_in, t, h, b, d_in, WIDE)
            a = _load(keys + at * b * d_in, t, h, b, d_in, WIDE)
        scores += _dot(x, tl.trans(a), OPERAND, WIDE, PRECISION)
        for part in tl.static_range(PARTS):
            share = tl.load(carry + (at * b + t) * PARTS + part, mask=t < b, other=0.0).to(WIDE)[:, None]
            w = _load(stack_2 + (at * PARTS + part) * size_2, o, h, d_out, width, WIDE)
            z += share * _dot(x, tl.trans(w), OPERAND, WIDE, PRECISION)
    error = _load(error_2 + at * b * d_out, t, o, b, d_out, WIDE)
    z -= _dot(scores * decay, error, OPERAND, WIDE, PRECISION)
    if KEEP:
        _store(asked_2 + at * b * d_out, t, o, b, d_out, z)
    if NORM:
        of_gain = tl.load(gain + row * d_out + o, mask=o < d_out, other=0.0).to(WIDE)
        residual = _load(queries + at * b * d_in, t, o, b, d_in, WIDE)
        z = residual + _normalise(z, o < d_out, d_out, eps)[0] * of_gain[None, :]
    _store(y + at * b * d_out, t, o, b, d_out, z)


@triton.jit
def read_backward_kernel(
    grad_y, queries, keys, gain, weigh, carry, stack_1, stack_2, input_2, error_1, error_2, asked_1, asked_2,
    grad_queries, grad_keys, grad_weigh, grad_carry, grad_gain, grad_stack_1, grad_stack_2, grad_input_2,
    grad_error_1, grad_error_2,
    rows, b, d_in, width, d_out, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    TIME: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk's reads of one row hand back, given each layer's outputs ``asked``."""
    at = tl.program_id(0).to(tl.int64)
    row = at % rows
    t, i, o, p = tl.arange(0, TIME), tl.arange(0, IN), tl.arange(0, OUT), tl.arange(0, 2)
    size_1, size_2 = width * d_in, d_out * width
    g = _load(grad_y + at * b * d_out, t, o, b, d_out, WIDE)
    if NORM:
        of_gain = tl.load(gain + row * d_out + o, mask=o < d_out, other=0.0).to(WIDE)
        z = _load(asked_2 + at * b * d_out, t, o, b, d_out, WIDE)
        n, inverse = _normalise(z, o < d_out, d_out, eps)
        tl.store(grad_gain + at * d_out + o, tl.sum(g * n, axis=0), mask=o < d_out)
        g = _pull(g * of_gain[None, :], n, inverse, o < d_out, d_out)
    decay = _load(weigh + at * b * b, t, t, b, b, WIDE)
    to_carry = tl.zeros((TIME, 2), WIDE)

    # the last layer: the gradient of its scores needs all of them
    scores = tl.zeros((TIME, TIME), WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            x = _activate(_load(asked_1 + at * b * width, t, h, b, width, WIDE), ACTIVATION)
            a = _load(input_2 + at * b * width, t, h, b, width, WIDE)
        else:
            x = _load(queries + at * b * d_in, t, h, b, d_in, WIDE)
            a = _load(keys + at * b * d_in, t, h, b, d_in, WIDE)
        scores += _dot(x, tl.trans(a), OPERAND, WIDE, PRECISION)
    error = _load(error_2 + at * b * d_out, t, o, b, d_out, WIDE)
    to_decayed = -_dot(g, tl.trans(error), OPERAND, WIDE, PRECISION)
    to_weigh = to_decayed * scores
    _store(grad_error_2 + at * b * d_out, t, o, b, d_out,
           -_dot(tl.trans(scores * decay), g, OPERAND, WIDE, PRECISION))  # fmt: skip
    to_scores = to_decayed * decay

    if LAYERS == 2:
        q = _load(queries + at * b * d_in, t, i, b, d_in, WIDE)
        k = _load(keys + at * b * d_in, t, i, b, d_in, WIDE)
        scores = _dot(q, tl.trans(k), OPERAND, WIDE, PRECISION)
        to_decayed = tl.zeros((TIME, TIME), WIDE)
        to_q = tl.zeros((TIME, IN), WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            below = _load(asked_1 + at * b * width, t, h, b, width, WIDE)
            x = _activate(below, ACTIVATION)
            a = _load(input_2 + at * b * width, t, h, b, width, WIDE)
        else:
            x = _load(queries + at * b * d_in, t, h, b, d_in, WIDE)
            a = _load(keys + at * b * d_in, t, h, b, d_in, WIDE)
        to_x = _dot(to_scores, a, OPERAND, WIDE, PRECISION)
        to_a = _dot(tl.trans(to_scores), x, OPERAND, WIDE, PRECISION)
        for part in tl.static_range(PARTS):
            share = tl.load(carry + (at * b + t) * PARTS + part, mask=t < b, other=0.0).to(WIDE)[:, None]
            place = (at * PARTS + part) * size_2
            _store(grad_stack_2 + place, o, h, d_out, width,
                   _dot(tl.trans(g * share), x, OPERAND, WIDE, PRECISION))  # fmt: skip
            w = _load(stack_2 + place, o, h, d_out, width, WIDE)
            back = _dot(g, w, OPERAND, WIDE, PRECISION)
            to_carry += tl.where(p == part, 1.0, 0.0).to(WIDE)[None, :] * tl.sum(x * back, axis=1)[:, None]
            to_x += share * back
        if LAYERS == 1:
            if NORM:
                to_x += _load(grad_y + at * b * d_out, t, h, b, d_out, WIDE)
            _store(grad_queries + at * b * d_in, t, h, b, d_in, to_x)
            _store(grad_keys + at * b * d_in, t, h, b, d_in, to_a)
        else:
            _store(grad_input_2 + at * b * width, t, h, b, width, to_a)
            to_below = to_x * _slope(below, ACTIVATION)
            e = _load(error_1 + at * b * width, t, h, b, width, WIDE)
            to_decayed -= _dot(to_below, tl.trans(e), OPERAND, WIDE, PRECISION)
            _store(grad_error_1 + at * b * width, t, h, b, width,
                   -_dot(tl.trans(scores * decay), to_below, OPERAND, WIDE, PRECISION))  # fmt: skip
            for part in tl.static_range(PARTS):
                share = tl.load(carry + (at * b + t) * PARTS + part, mask=t < b, other=0.0).to(WIDE)[:, None]
                place = (at * PARTS + part) * size_1
                _store(grad_stack_1 + place, h, i, width, d_in,
                       _dot(tl.trans(to_below * share), q, OPERAND, WIDE, PRECISION))  # fmt: skip
                w_1 = _load(stack_1 + place, h, i, width, d_in, WIDE)
                back_1 = _dot(to_below, w_1, OPERAND, WIDE, PRECISION)
                to_carry += tl.where(p == part, 1.0, 0.0).to(WIDE)[None, :] * tl.sum(q * back_1, axis=1)[:, None]
                to_q += share * back_1
    if LAYERS == 2:
        to_weigh += to_decayed * scores
        to_scores = to_decayed * decay
        to_q += _dot(to_scores, k, OPERAND, WIDE, PRECISION)
        if NORM:
            to_q += _load(grad_y + at * b * d_out, t, i, b, d_out, WIDE)
        _store(grad_queries + at * b * d_in, t, i, b, d_in, to_q)
        _store(grad_keys + at * b * d_in, t, i, b, d_in, _dot(tl.trans(to_scores), q, OPERAND, WIDE, PRECISION))
    _store(grad_weigh + at * b * b, t, t, b, b, to_weigh)
    tl.store(grad_carry + (at * b + t[:, None]) * PARTS + p[None, :], to_carry,
             mask=(t < b)[:, None] & (p < PARTS)[None, :])  # fmt: skip


# -- backward of writing -----------------------------------------------------------------------------------------------


@triton.jit
def _curvature(z, ACTIVATION: tl.constexpr):
    """The second derivative."""
    if ACTIVATION == SILU:
        s = 1 / (1 + tl.exp(-z))
        second = s * (1 - s) * (2 + z * (1 - 2 * s))
    elif ACTIVATION == GELU:
        second = tl.exp(-0.5 * z * z) * 0.3989422804014327 * (2 - z * z)
    else:
        second = tl.zeros(z.shape, z.dtype)
    return second


@triton.jit
def _column(matrix, at, b, t, part, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """One column of ``[chunks, rows, b, PARTS]``."""
    return tl.load(matrix + (at * b + t) * PARTS + part, mask=t < b, other=0.0).to(WIDE)[:, None]


@triton.jit
def _pull_state(mix, to_mix, at, start, later, before, r, c, rows_of, columns, size, p,
                PARTS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A tile of the state before a chunk: gets what the state after it was due through ``mix``; and ``mix``'s share."""
    for part in tl.static_range(PARTS):
        total = _load(before + part * size, r, c, rows_of, columns, WIDE)
        here = _load(start + part * size, r, c, rows_of, columns, WIDE)
        for other in tl.static_range(PARTS):
            after = _load(later + other * size, r, c, rows_of, columns, WIDE)
            total += tl.load(mix + (at * PARTS + other) * PARTS + part).to(WIDE) * after
            to_mix += tl.where(p == other * 2 + part, 1.0, 0.0).to(WIDE) * tl.sum(after * here)
        _store(before + part * size, r, c, rows_of, columns, total)
    return to_mix


@triton.jit
def write_backward_kernel(
    keys, values, gain, mix, write, anchor_1, anchor_2, stack_1, stack_2,
    input_2, hidden_1, hidden_2, raw_1, raw_2, error_1, error_2,
    grad_stack_1, grad_stack_2, grad_keys, grad_input_2, grad_error_1, grad_error_2,
    grad_values, grad_write, grad_mix, grad_gain, grad_anchor_1, grad_anchor_2,
    chunks, rows, b, d_in, width, d_out, clip, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    ANCHORED: tl.constexpr, TIME: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every chunk of one row, the last first. The gradients that reads have left are added to where they lie."""
    row = tl.program_id(0).to(tl.int64)
    t, i, o = tl.arange(0, TIME), tl.arange(0, IN), tl.arange(0, OUT)
    p, four = tl.arange(0, 2), tl.arange(0, 4)
    real = (t < b)[:, None]
    size_1, size_2 = width * d_in, d_out * width
    of_gain = tl.full((OUT,), 1.0, WIDE)
    if NORM:
        of_gain = tl.load(gain + row * d_out + o, mask=o < d_out, other=0.0).to(WIDE)
    to_gain = tl.zeros((OUT,), WIDE)
    for back in range(chunks):
        chunk = chunks - 1 - back
        at = chunk * rows + row
        k = _load(keys + at * b * d_in, t, i, b, d_in, WIDE)
        state_1, state_2 = stack_1 + at * PARTS * size_1, stack_2 + at * PARTS * size_2
        before_1, before_2 = grad_stack_1 + at * PARTS * size_1, grad_stack_2 + at * PARTS * size_2
        later_1, later_2 = before_1 + rows * PARTS * size_1, before_2 + rows * PARTS * size_2
        w_1, w_2, onto_1, onto_2 = state_1, state_2, before_1, before_2
        if ANCHORED:  # known when compiling, and the rest is not  # noqa: SIM102
            if chunk == 0:
                w_1, w_2 = anchor_1 + row * size_1, anchor_2 + row * size_2
                onto_1, onto_2 = grad_anchor_1 + row * size_1, grad_anchor_2 + row * size_2
        last_input, to_last_input = keys + at * b * d_in, grad_keys + at * b * d_in
        if LAYERS == 2:
            last_input, to_last_input = input_2 + at * b * width, grad_input_2 + at * b * width
        raw = _load(raw_2 + at * b * d_out, t, o, b, d_out, WIDE)
        error = _load(error_2 + at * b * d_out, t, o, b, d_out, WIDE)
        to_error = _load(grad_error_2 + at * b * d_out, t, o, b, d_out, WIDE)
        to_k = tl.zeros((TIME, IN), WIDE)
        if LAYERS == 2:
            to_k = _load(grad_keys + at * b * d_in, t, i, b, d_in, WIDE)
        to_write = tl.zeros((TIME, 2), WIDE)
        to_mix = tl.zeros((4,), WIDE)

        # through the state after the chunk: mix state - (write errors)^T inputs
        squares_1, squares_2 = tl.zeros((TIME,), WIDE), tl.zeros((TIME,), WIDE)  # |raw_1|^2 and |input_2|^2
        to_scale = tl.zeros((TIME,), WIDE)
        for part in tl.static_range(PARTS):
            share = _column(write, at, b, t, part, PARTS, WIDE)
            felt = tl.zeros((TIME, OUT), WIDE)
            for h0 in range(0, width, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                a = _load(last_input, t, h, b, width, WIDE)
                after_2 = _load(later_2 + part * size_2, o, h, d_out, width, WIDE)
                felt += _dot(a, tl.trans(after_2), OPERAND, WIDE, PRECISION)
                to_a = _load(to_last_input, t, h, b, width, WIDE)
                to_a -= _dot(error * share, after_2, OPERAND, WIDE, PRECISION)
                _store(to_last_input, t, h, b, width, to_a)
                if LAYERS == 2:
                    e = _load(error_1 + at * b * width, t, h, b, width, WIDE)
                    after_1 = _load(later_1 + part * size_1, h, i, width, d_in, WIDE)
                    felt_1 = _dot(k, tl.trans(after_1), OPERAND, WIDE, PRECISION)
                    to_e = _load(grad_error_1 + at * b * width, t, h, b, width, WIDE) - felt_1 * share
                    _store(grad_error_1 + at * b * width, t, h, b, width, to_e)
                    to_write -= tl.where(p == part, 1.0, 0.0).to(WIDE)[None, :] * tl.sum(felt_1 * e, axis=1)[:, None]
                    to_k -= _dot(e * share, after_1, OPERAND, WIDE, PRECISION)
            to_error -= felt * share
            to_write -= tl.where(p == part, 1.0, 0.0).to(WIDE)[None, :] * tl.sum(felt * error, axis=1)[:, None]
            tl.debug_barrier()
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            to_mix = _pull_state(mix, to_mix, at, state_2, later_2, before_2, o, h, d_out, width, size_2, four,
                                 PARTS, WIDE)  # fmt: skip
            if LAYERS == 2:
                to_mix = _pull_state(mix, to_mix, at, state_1, later_1, before_1, h, i, width, d_in, size_1, four,
                                     PARTS, WIDE)  # fmt: skip
            if CLIP:
                a = _load(last_input, t, h, b, width, WIDE)
                squares_2 += tl.sum(a * a, axis=1)
                if LAYERS == 2:
                    e = _load(raw_1 + at * b * width, t, h, b, width, WIDE)
                    squares_1 += tl.sum(e * e, axis=1)
                    to_e = _load(grad_error_1 + at * b * width, t, h, b, width, WIDE)
                    to_scale += tl.sum(to_e * e, axis=1)
        tl.store(grad_write + (at * b + t[:, None]) * PARTS + p[None, :], to_write,
                 mask=real & (p < PARTS)[None, :])  # fmt: skip
        tl.store(grad_mix + (at * PARTS + four // 2) * PARTS + four % 2, to_mix,
                 mask=(four // 2 < PARTS) & (four % 2 < PARTS))  # fmt: skip

        # through errors = scale raw, where scale = clip / |surprise| below one
        scale, to_square = tl.full((TIME,), 1.0, WIDE), tl.zeros((TIME,), WIDE)
        squares_k, squares_raw = tl.sum(k * k, axis=1), tl.sum(raw * raw, axis=1)
        if CLIP:
            square = 4 * squares_raw * squares_2
            if LAYERS == 2:
                square += 4 * squares_1 * squares_k
            scale = clip / tl.maximum(tl.sqrt(square), clip)
            to_scale += tl.sum(to_error * raw, axis=1)
            to_square = tl.where(scale < 1, -4 * to_scale * scale / square, 0.0)
            to_error = to_error * scale[:, None] + raw * (to_square * squares_2)[:, None]

        # errors run down the layers, so their gradient runs up ...
        if LAYERS == 2:
            for h0 in range(0, width, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                to_e = _load(grad_error_1 + at * b * width, t, h, b, width, WIDE)
                if CLIP:
                    e = _load(raw_1 + at * b * width, t, h, b, width, WIDE)
                    to_e = to_e * scale[:, None] + e * (to_square * squares_k)[:, None]
                    _store(grad_error_1 + at * b * width, t, h, b, width, to_e)
                below = _load(hidden_1 + at * b * width, t, h, b, width, WIDE)
                w = _load(w_2, o, h, d_out, width, WIDE)
                pushed_1 = tl.where(real, to_e * _slope(below, ACTIVATION), 0.0)
                to_error += _dot(pushed_1, tl.trans(w), OPERAND, WIDE, PRECISION)
        # ... through the loss ...
        g = to_error
        if NORM:
            z = _load(hidden_2 + at * b * d_out, t, o, b, d_out, WIDE)
            v = _load(values + at * b * d_out, t, o, b, d_out, WIDE)
            residual = _load(keys + at * b * d_in, t, o, b, d_in, WIDE)
            n, inverse = _normalise(z, o < d_out, d_out, eps)
            miss = residual + n * of_gain[None, :] - v
            pushed = miss * of_gain[None, :]
            to_pushed = _pull(g, n, inverse, o < d_out, d_out)
            to_miss = to_pushed * of_gain[None, :]
            # the error depends on z through the inner n, through the n of its own projection, and through 1 / sigma
            falling = g * inverse
            to_n = to_miss * of_gain[None, :]
            to_n -= falling * (tl.sum(pushed * n, axis=1)[:, None] / d_out)
            to_n -= pushed * (tl.sum(falling * n, axis=1)[:, None] / d_out)
            to_gain += tl.sum(tl.where(real, to_pushed * miss + to_miss * n, 0.0), axis=0)
            _store(grad_values + at * b * d_out, t, o, b, d_out, -to_miss)
            g = _pull(to_n, n, inverse, o < d_out, d_out) - n * (tl.sum(falling * raw, axis=1)[:, None] / d_out)
            if LAYERS == 2:
                # a residual network is as wide at its end as at its beginning
                to_k += to_miss
        else:
            _store(grad_values + at * b * d_out, t, o, b, d_out, -g)
        g = tl.where(real, g, 0.0)
        tl.debug_barrier()
        # ... and then the inputs' gradient runs down
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            a = _load(last_input, t, h, b, width, WIDE)
            w = _load(w_2, o, h, d_out, width, WIDE)
            to_a = _load(to_last_input, t, h, b, width, WIDE) + _dot(g, w, OPERAND, WIDE, PRECISION)
            if CLIP:
                to_a += a * (to_square * squares_raw)[:, None]
            to_w = _load(onto_2, o, h, d_out, width, WIDE) + _dot(tl.trans(g), a, OPERAND, WIDE, PRECISION)
            if LAYERS == 2:
                below = _load(hidden_1 + at * b * width, t, h, b, width, WIDE)
                to_e = _load(grad_error_1 + at * b * width, t, h, b, width, WIDE)
                slope = _slope(below, ACTIVATION)
                to_w += _dot(tl.trans(raw), to_e * slope, OPERAND, WIDE, PRECISION)
                to_below = to_a * slope
                pulled = _dot(raw, w, OPERAND, WIDE, PRECISION)
                to_below += to_e * pulled * _curvature(below, ACTIVATION)
                to_below = tl.where(real, to_below, 0.0)
                tile_1 = _load(w_1, h, i, width, d_in, WIDE)
                to_k += _dot(to_below, tile_1, OPERAND, WIDE, PRECISION)
                to_w_1 = _load(onto_1, h, i, width, d_in, WIDE)
                to_w_1 += _dot(tl.trans(to_below), k, OPERAND, WIDE, PRECISION)
                _store(onto_1, h, i, width, d_in, to_w_1)
            elif NORM:
                to_a -= _load(grad_values + at * b * d_out, t, h, b, d_out, WIDE)
            _store(onto_2, o, h, d_out, width, to_w)
            if LAYERS == 1:
                _store(to_last_input, t, h, b, width, to_a)
        if LAYERS == 2:
            if CLIP:
                to_k += k * (to_square * squares_1)[:, None]
            _store(grad_keys + at * b * d_in, t, i, b, d_in, to_k)
        tl.debug_barrier()
    if NORM:
        tl.store(grad_gain + row * d_out + o, to_gain, mask=o < d_out)
