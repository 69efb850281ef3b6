"""Reading a group of chunks, and its backward: ``read`` and ``read_backward`` of ``ChunkNetwork`` as Triton kernels.

Reads have no order: a program reads ``TOKENS`` queries of one chunk of one head, at the state that the chunk started
from and with what the chunk itself has written so far, by one decay-weighted product of scores, as in attention. The
chunk's keys come ``KEYS`` at a time and the hidden layer ``BLOCK`` units at a time. What each block needs again (layer
1's weighted scores, the hidden values) is kept in global memory, which is in the cache at this size.

LayerNorm takes no notice of the length of the last layer's output, so that large terms cancel in the gradients of
gates. The products with the state, those with the gradient of the outputs, and the errors' share of hidden values are
therefore ``FINE``. With half precision there, gradients of gates were off by up to 3%.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_runtime import VARYING
from .tiles import (
    activate,
    coefficient,
    dot,
    in_part,
    layer_norm,
    layer_norm_vjp,
    load,
    load_gain,
    load_half,
    load_hidden,
    load_tokens,
    replace_tokens,
    slope,
    store,
    store_half,
    store_tokens,
)


@triton.jit
def weighted_scores(scores, decay):
    """Zero where the key is not written yet, also where the score overflows."""
    return tl.where(decay == 0, 0.0, scores * decay)


@triton.jit
def confined(weighted, error, t, s, OPERAND: tl.constexpr, WIDE: tl.constexpr):
    """For ``weighted @ error``: errors that are finite, and a column that is 1 for queries that become NaN.

    An error that is not finite reaches the queries from its token on alone. Errors of later tokens are multiplied by
    zero, and zero times infinity is NaN. They are therefore taken as zero. ``s``: the tokens that the errors are of.
    """
    # rounding to bfloat16 makes more than this infinite
    largest: tl.constexpr = 3.38e38 if WIDE.primitive_bitwidth == 32 else float("inf")
    finite = tl.abs(error.to(OPERAND).to(WIDE)) < largest
    lost = tl.max(tl.where(finite, 0, 1), axis=1)
    # the token's own write is seen where its weight is not zero: reads may come before it
    seen = (s[None, :] < t[:, None]) | ((s[None, :] == t[:, None]) & (weighted != 0))
    return tl.where(finite, error, 0.0), tl.max(tl.where(seen, lost[None, :], 0), axis=1)[:, None]


@triton.jit
def written_part(weighted, error, t, s, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """``weighted @ error``, :func:`confined`."""
    finite, poison = confined(weighted, error, t, s, OPERAND, WIDE)
    return tl.where(poison > 0, float("nan"), dot(weighted, finite, OPERAND, WIDE, PRECISION))


@triton.jit(do_not_specialize=VARYING)
def read_kernel(
    queries, keys, gain, read, carry, stack_1, stack_2, input_2, error_1, error_2, scores_1, y, z_1, z_2,
    batch_heads, b, writes, d_in, width, d_out,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
    KEEP: tl.constexpr,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """``TOKENS`` queries, each at the weights after its token. Layers as in ``write_kernel``.

    At depth 1 ``z_1`` are the queries, and there is no activation.
    """
    at = tl.program_id(0).to(tl.int64)  # chunk * batch_heads + bh
    first, written = at * b, at * writes
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    up = (1 + GATED) * width
    size_1, size_2 = up * d_in, d_out * width
    if LAYERS == 2:
        q = load_tokens(queries, first, t, i, b, d_in, WIDE)
        for s0 in range(0, writes, KEYS):
            s = s0 + tl.arange(0, KEYS)
            k = load_tokens(keys, written, s, i, writes, d_in, WIDE)
            scores = dot(q, tl.trans(k), OPERAND, WIDE, PRECISION)
            decay = load_tokens(read, first, t, s, b, writes, WIDE)
            store_tokens(scores_1, first, t, s, b, writes, weighted_scores(scores, decay))
        tl.debug_barrier()

    z = tl.zeros((TOKENS, OUT), WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            x = tl.zeros((TOKENS, BLOCK), WIDE)
            for half in tl.static_range(1 + GATED):
                preact = tl.zeros((TOKENS, BLOCK), WIDE)
                for s0 in range(0, writes, KEYS):
                    s = s0 + tl.arange(0, KEYS)
                    weighted = load_tokens(scores_1, first, t, s, b, writes, WIDE)
                    error = load_half(error_1, half, written, s, h, writes, width, GATED, WIDE)
                    preact -= written_part(weighted, error, t, s + b - writes, FINE, WIDE, FINE_PRECISION)
                for part in range(PARTS):
                    w_1 = stack_1 + (at * PARTS + part) * size_1 + half * width * d_in
                    product = dot(q, tl.trans(load(w_1, h, i, width, d_in, WIDE)), FINE, WIDE, FINE_PRECISION)
                    preact += coefficient(carry, first, t, b, part, PARTS, WIDE) * product
                store_half(z_1, half, first, t, h, b, width, preact, GATED)
                x = activate(preact, ACTIVATION) if half == 0 else x * preact
        else:
            x = activate(load_tokens(z_1, first, t, h, b, width, WIDE), ACTIVATION)
        for part in range(PARTS):
            w = load(stack_2 + (at * PARTS + part) * size_2, o, h, d_out, width, WIDE)
            product = dot(x, tl.trans(w), FINE, WIDE, FINE_PRECISION)
            z += coefficient(carry, first, t, b, part, PARTS, WIDE) * product
    tl.debug_barrier()

    # the last layer's scores: of a block of keys, over all hidden units
    for s0 in range(0, writes, KEYS):
        s = s0 + tl.arange(0, KEYS)
        scores = tl.zeros((TOKENS, KEYS), WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            x = load_hidden(z_1, first, t, h, b, width, ACTIVATION, GATED, WIDE)
            a = load_tokens(input_2, written, s, h, writes, width, WIDE)
            scores += dot(x, tl.trans(a), OPERAND, WIDE, PRECISION)
        weighted = weighted_scores(scores, load_tokens(read, first, t, s, b, writes, WIDE))
        error = load_tokens(error_2, written, s, o, writes, d_out, WIDE)
        z -= written_part(weighted, error, t, s + b - writes, OPERAND, WIDE, PRECISION)
    if KEEP:
        store_tokens(z_2, first, t, o, b, d_out, z)
    if NORM:
        gain_o = load_gain(gain, at % batch_heads, o, d_out, OUT, NORM, WIDE)
        residual = load_tokens(queries, first, t, o, b, d_in, WIDE)
        z = residual + layer_norm(z, o < d_out, d_out)[0] * gain_o[None, :]
    store_tokens(y, first, t, o, b, d_out, z)


# -- backward ----------------------------------------------------------------------------------------------
#
# Two launches whose programs have no order. The first is the queries' side: ``TOKENS`` queries of one chunk of one head
# take the gradient of their outputs down the layers. It stores what the second multiplies: the gradient of each
# layer's output (``grad_z``) and, for every query and key, each layer's weighted scores (``scores``) and the gradient
# of the unweighted ones (``grad_scores``). The second computes sums over the chunk's queries, one product for each:
# the gradients of keys, errors and states.


@triton.jit(do_not_specialize=VARYING)
def read_backward_kernel(
    grad_y, queries, keys, gain, read, carry, stack_1, stack_2, input_2, error_1, error_2, z_1, z_2,
    grad_queries, grad_read, grad_carry, grad_gain,
    grad_z_1, grad_z_2, scores_1, scores_2, grad_scores_1, grad_scores_2,
    batch_heads, b, writes, d_in, width, d_out,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' side: ``TOKENS`` queries, given each layer's outputs ``z``. Layers as in ``read_kernel``."""
    at = tl.program_id(0).to(tl.int64)  # chunk * batch_heads + bh
    first, written = at * b, at * writes
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    i, o, p = tl.arange(0, IN), tl.arange(0, OUT), tl.arange(0, 2)
    up = (1 + GATED) * width
    size_1, size_2 = up * d_in, d_out * width
    g = load_tokens(grad_y, first, t, o, b, d_out, WIDE)
    if NORM:
        n, inverse = layer_norm(load_tokens(z_2, first, t, o, b, d_out, WIDE), o < d_out, d_out)
        place = (at * tl.num_programs(1) + tl.program_id(1)) * d_out + o
        tl.store(grad_gain + place, tl.sum(g * n, axis=0), mask=o < d_out)
        gain_o = load_gain(gain, at % batch_heads, o, d_out, OUT, NORM, WIDE)
        g = layer_norm_vjp(g * gain_o[None, :], n, inverse, o < d_out, d_out)
    store_tokens(grad_z_2, first, t, o, b, d_out, g)

    # the last layer's scores
    for s0 in range(0, writes, KEYS):
        s = s0 + tl.arange(0, KEYS)
        scores = tl.zeros((TOKENS, KEYS), WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            x = load_hidden(z_1, first, t, h, b, width, ACTIVATION, GATED, WIDE)
            a = load_tokens(input_2, written, s, h, writes, width, WIDE)
            scores += dot(x, tl.trans(a), OPERAND, WIDE, PRECISION)
        decay = load_tokens(read, first, t, s, b, writes, WIDE)
        error = load_tokens(error_2, written, s, o, writes, d_out, WIDE)
        dscores = -dot(g, tl.trans(error), FINE, WIDE, FINE_PRECISION)
        store_tokens(grad_read, first, t, s, b, writes, dscores * scores)
        store_tokens(scores_2, first, t, s, b, writes, scores * decay)
        store_tokens(grad_scores_2, first, t, s, b, writes, dscores * decay)
    tl.debug_barrier()

    # down through the last layer; its output has no part along g, if the coefficients' gradients multiply the inputs as
    # forward rounded them
    dcarry = tl.zeros((TOKENS, 2), WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        dx = tl.zeros((TOKENS, BLOCK), WIDE)
        for s0 in range(0, writes, KEYS):
            s = s0 + tl.arange(0, KEYS)
            grad_scores = load_tokens(grad_scores_2, first, t, s, b, writes, WIDE)
            dx += dot(grad_scores, load_tokens(input_2, written, s, h, writes, width, WIDE), FINE, WIDE, FINE_PRECISION)
        x = load_hidden(z_1, first, t, h, b, width, ACTIVATION, GATED, WIDE)
        for part in range(PARTS):
            w = load(stack_2 + (at * PARTS + part) * size_2, o, h, d_out, width, WIDE)
            back = dot(g, w, FINE, WIDE, FINE_PRECISION)
            dcarry += in_part(tl.sum(x * back, axis=1), part, WIDE)
            dx += coefficient(carry, first, t, b, part, PARTS, WIDE) * back
        if LAYERS == 1:
            if NORM:
                dx += load_tokens(grad_y, first, t, h, b, d_out, WIDE)
            store_tokens(grad_queries, first, t, h, b, width, dx)
        else:
            preact = load_half(z_1, 0, first, t, h, b, width, GATED, WIDE)
            dpreact = dx * slope(preact, ACTIVATION)
            if GATED:
                dpreact *= load_half(z_1, 1, first, t, h, b, width, GATED, WIDE)
                store_half(grad_z_1, 1, first, t, h, b, width, dx * activate(preact, ACTIVATION), GATED)
            store_half(grad_z_1, 0, first, t, h, b, width, dpreact, GATED)

    # through the state of the first layer, and its scores
    if LAYERS == 2:
        tl.debug_barrier()
        dq = tl.zeros((TOKENS, IN), WIDE)
        for h0 in range(0, up, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            dpreact = load_tokens(grad_z_1, first, t, h, b, up, WIDE)
            for part in range(PARTS):
                w_1 = load(stack_1 + (at * PARTS + part) * size_1, h, i, up, d_in, WIDE)
                back_1 = dot(dpreact, w_1, FINE, WIDE, FINE_PRECISION)
                q = load_tokens(queries, first, t, i, b, d_in, WIDE)
                dcarry += in_part(tl.sum(q * back_1, axis=1), part, WIDE)
                dq += coefficient(carry, first, t, b, part, PARTS, WIDE) * back_1
        for s0 in range(0, writes, KEYS):
            s = s0 + tl.arange(0, KEYS)
            dscores = tl.zeros((TOKENS, KEYS), WIDE)
            for h0 in range(0, up, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                dpreact = load_tokens(grad_z_1, first, t, h, b, up, WIDE)
                e = load_tokens(error_1, written, s, h, writes, up, WIDE)
                dscores -= dot(dpreact, tl.trans(e), OPERAND, WIDE, PRECISION)
            q = load_tokens(queries, first, t, i, b, d_in, WIDE)
            k = load_tokens(keys, written, s, i, writes, d_in, WIDE)
            scores = dot(q, tl.trans(k), OPERAND, WIDE, PRECISION)
            decay = load_tokens(read, first, t, s, b, writes, WIDE)
            dread = load_tokens(grad_read, first, t, s, b, writes, WIDE) + dscores * scores
            replace_tokens(grad_read, first, t, s, b, writes, dread)
            store_tokens(scores_1, first, t, s, b, writes, scores * decay)
            grad_scores = dscores * decay
            store_tokens(grad_scores_1, first, t, s, b, writes, grad_scores)
            dq += dot(grad_scores, k, OPERAND, WIDE, PRECISION)
        if NORM:
            dq += load_tokens(grad_y, first, t, i, b, d_out, WIDE)
        store_tokens(grad_queries, first, t, i, b, d_in, dq)
    tl.store(grad_carry + (first + t[:, None]) * PARTS + p[None, :], dcarry,
             mask=(t < b)[:, None] & (p < PARTS)[None, :])  # fmt: skip


@triton.jit
def _over_queries(matrix, x, first, s, column, b, writes, columns,
                  TOKENS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr,
                  GATED: tl.constexpr,
                  OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``matrix^T activate(x)`` at some keys, ``matrix`` being of queries and keys."""
    total = tl.zeros((KEYS, COLUMNS), WIDE)
    for t0 in range(0, b, TOKENS):
        t = t0 + tl.arange(0, TOKENS)
        left = load_tokens(matrix, first, t, s, b, writes, WIDE)
        right = load_hidden(x, first, t, column, b, columns, ACTIVATION, GATED, WIDE)
        total += dot(tl.trans(left), right, OPERAND, WIDE, PRECISION)
    return total


@triton.jit
def _state_gradient(grad_z, x, carry, first, part, r, c, b, rows_of, columns,
              PARTS: tl.constexpr, TOKENS: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr,
              ACTIVATION: tl.constexpr, GATED: tl.constexpr,
              OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``(carry grad_z)^T activate(x)``: a tile of the gradient of one part of a layer's state."""
    total = tl.zeros((HIGH, WIDTH), WIDE)
    for t0 in range(0, b, TOKENS):
        t = t0 + tl.arange(0, TOKENS)
        left = load_tokens(grad_z, first, t, r, b, rows_of, WIDE) * coefficient(carry, first, t, b, part, PARTS, WIDE)
        right = load_hidden(x, first, t, c, b, columns, ACTIVATION, GATED, WIDE)
        total += dot(tl.trans(left), right, OPERAND, WIDE, PRECISION)
    return total


@triton.jit(do_not_specialize=VARYING)
def read_backward_state_kernel(
    queries, carry, z_1, grad_z_1, grad_z_2, scores_1, scores_2, grad_scores_1, grad_scores_2,
    grad_keys, grad_input_2, grad_error_1, grad_error_2, grad_stack_1, grad_stack_2,
    b, writes, d_in, width, d_out,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys' and state's side, of one chunk of one head. At depth 1 ``grad_input_2`` is the keys' gradient."""
    at = tl.program_id(0).to(tl.int64)  # chunk * batch_heads + bh
    first, written = at * b, at * writes
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    up = (1 + GATED) * width
    size_1, size_2 = up * d_in, d_out * width
    for s0 in range(0, writes, KEYS):
        s = s0 + tl.arange(0, KEYS)
        derror = -_over_queries(scores_2, grad_z_2, first, s, o, b, writes, d_out,
                                  TOKENS, KEYS, OUT, 0, 0, OPERAND, WIDE, PRECISION)  # fmt: skip
        store_tokens(grad_error_2, written, s, o, writes, d_out, derror)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            dinput = _over_queries(grad_scores_2, z_1, first, s, h, b, writes, width,
                                     TOKENS, KEYS, BLOCK, ACTIVATION, GATED, OPERAND, WIDE, PRECISION)  # fmt: skip
            store_tokens(grad_input_2, written, s, h, writes, width, dinput)
        if LAYERS == 2:
            for h0 in range(0, up, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                derror_1 = -_over_queries(scores_1, grad_z_1, first, s, h, b, writes, up,
                                            TOKENS, KEYS, BLOCK, 0, 0, OPERAND, WIDE, PRECISION)  # fmt: skip
                store_tokens(grad_error_1, written, s, h, writes, up, derror_1)
            dkey = _over_queries(grad_scores_1, queries, first, s, i, b, writes, d_in,
                                   TOKENS, KEYS, IN, 0, 0, OPERAND, WIDE, PRECISION)  # fmt: skip
            store_tokens(grad_keys, written, s, i, writes, d_in, dkey)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        for part in range(PARTS):
            tile = _state_gradient(grad_z_2, z_1, carry, first, part, o, h, b, d_out, width,
                             PARTS, TOKENS, OUT, BLOCK, ACTIVATION, GATED, FINE, WIDE, FINE_PRECISION)  # fmt: skip
            store(grad_stack_2 + (at * PARTS + part) * size_2, o, h, d_out, width, tile)
    if LAYERS == 2:
        for h0 in range(0, up, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            for part in range(PARTS):
                tile_1 = _state_gradient(grad_z_1, queries, carry, first, part, h, i, b, up, d_in,
                                   PARTS, TOKENS, BLOCK, IN, 0, 0, FINE, WIDE, FINE_PRECISION)  # fmt: skip
                store(grad_stack_1 + (at * PARTS + part) * size_1, h, i, up, d_in, tile_1)
