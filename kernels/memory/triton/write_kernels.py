"""Writing a group of chunks: ``write`` and ``rewrite`` of ``chunk_torch.ChunkNetwork`` as Triton kernels.

Writing is sequential: the gradients of a chunk are taken at the weights that the chunk before it left. A program goes
through the chunks of one head of one batch row. Per chunk it runs the keys forward through the weights and errors
back, ``TOKENS`` tokens at a time, and then updates the state by one product with the gates (``mix``) and one with the
errors. It works on ``BLOCK`` units of the hidden layer at a time, so that it holds a few tiles of tokens x units
and nothing of the state, which streams through the L2 cache. Each chunk's starting state is left in global memory for
reads and for the backward pass.

``write_resident_kernel`` does the same with the state in registers, where it fits.

LayerNorm's Jacobian amplifies the rounding errors of the first products, and its derivative does so again. In half
precision they are therefore ``FINE``; with bfloat16 there, gradients were off by twice as much.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_runtime import VARYING
from .tiles import (
    activate,
    channel_mix,
    channel_weights,
    clip_scale,
    coefficient,
    dot,
    gradient_norm,
    length,
    load,
    load_deltas,
    load_gain,
    load_half,
    load_tokens,
    output_error,
    row_length,
    slope,
    square_sums,
    store,
    store_half,
    store_tokens,
    token_weight,
)


@triton.jit
def _differentiate(
    keys, values, deltas, w_1, w_2, gain_o, input_2, output_1, output_2, unclipped_1, unclipped_2, error_1, error_2,
    first, t0, b, d_in, width, d_out,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    TOKENS: tl.constexpr, FEW: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, FINE: tl.constexpr, FINE_PRECISION: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, DELTAS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """``TOKENS`` tokens of a chunk from ``t0`` on: keys forward through the weights, half errors back.

    A tile is loaded where it is used, because registers are few; the loss takes ``FEW`` tokens at a time.
    """
    t, o = t0 + tl.arange(0, TOKENS), tl.arange(0, OUT)

    # keys forward
    z = tl.zeros((TOKENS, OUT), WIDE)
    squares, small_squares = tl.zeros((TOKENS,), WIDE), tl.zeros((TOKENS,), WIDE)  # of the last layer's input
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            a = tl.zeros((TOKENS, BLOCK), WIDE)
            for half in tl.static_range(1 + GATED):
                preact = tl.zeros((TOKENS, BLOCK), WIDE)
                for i0 in range(0, d_in, IN):
                    i = i0 + tl.arange(0, IN)
                    k = load_tokens(keys, first, t, i, b, d_in, WIDE)
                    tile_1 = load(w_1 + half * width * d_in, h, i, width, d_in, WIDE)
                    preact += dot(k, tl.trans(tile_1), FINE, WIDE, FINE_PRECISION)
                store_half(output_1, half, first, t, h, b, width, preact, GATED)
                a = activate(preact, ACTIVATION) if half == 0 else a * preact
            store_tokens(input_2, first, t, h, b, width, a)
        else:
            a = load_tokens(input_2, first, t, h, b, width, WIDE)
        if CLIP is not None:
            more, small_more = square_sums(a, 1, WIDE)
            squares += more
            small_squares += small_more
        w = load(w_2, o, h, d_out, width, WIDE)
        z += dot(a, tl.trans(w), FINE, WIDE, FINE_PRECISION)
    store_tokens(output_2, first, t, o, b, d_out, z)
    tl.debug_barrier()

    # the loss
    for s0 in range(t0, t0 + TOKENS, FEW):
        s = s0 + tl.arange(0, FEW)
        z_s = load_tokens(output_2, first, s, o, b, d_out, WIDE)
        residual = z_s
        if NORM:
            residual = load_tokens(keys, first, s, o, b, d_in, WIDE)
        v = load_tokens(values, first, s, o, b, d_out, WIDE)
        delta = load_deltas(deltas, first, s, b, DELTA, DELTAS, WIDE)
        error = output_error(z_s, residual, v, delta, gain_o, o < d_out, d_out, NORM, LOSS, POWER, SMOOTH)
        store_tokens(unclipped_2, first, s, o, b, d_out, error)
    tl.debug_barrier()

    # errors back
    e_squares, small_e_squares = tl.zeros((TOKENS,), WIDE), tl.zeros((TOKENS,), WIDE)
    if LAYERS == 2:
        error = load_tokens(unclipped_2, first, t, o, b, d_out, WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            w = load(w_2, o, h, d_out, width, WIDE)
            preact = load_half(output_1, 0, first, t, h, b, width, GATED, WIDE)
            back = dot(error, w, FINE, WIDE, FINE_PRECISION)
            for half in tl.static_range(1 + GATED):
                e = back * activate(preact, ACTIVATION) if half else back * slope(preact, ACTIVATION)
                if GATED and half == 0:
                    e *= load_half(output_1, 1, first, t, h, b, width, GATED, WIDE)
                store_half(unclipped_1, half, first, t, h, b, width, e, GATED)
                if CLIP is not None:
                    more, small_more = square_sums(e, 1, WIDE)
                    e_squares += more
                    small_e_squares += small_more
    if CLIP is not None:
        error = load_tokens(unclipped_2, first, t, o, b, d_out, WIDE)
        k_squares, small_k_squares = tl.zeros((TOKENS,), WIDE), tl.zeros((TOKENS,), WIDE)
        if LAYERS == 2:
            for i0 in range(0, d_in, IN):
                k = load_tokens(keys, first, t, i0 + tl.arange(0, IN), b, d_in, WIDE)
                more, small_more = square_sums(k, 1, WIDE)
                k_squares += more
                small_k_squares += small_more
        norm = gradient_norm(
            length(e_squares, small_e_squares, WIDE), length(k_squares, small_k_squares, WIDE),
            row_length(error, WIDE), length(squares, small_squares, WIDE),
        )  # fmt: skip
        scale = clip_scale(norm, CLIP)
        store_tokens(error_2, first, t, o, b, d_out, error * scale[:, None])
        if LAYERS == 2:
            tl.debug_barrier()
            up = (1 + GATED) * width
            for h0 in range(0, up, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                e = load_tokens(unclipped_1, first, t, h, b, up, WIDE)
                store_tokens(error_1, first, t, h, b, up, e * scale[:, None])


@triton.jit
def _advance(stack, after, mix, write, errors, inputs, out, width, b, at, start, channels,
             PARTS: tl.constexpr, BY_CHANNEL: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
             TOKENS: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One layer's state after a chunk: ``mix state - (write errors)^T inputs``, tile by tile.

    With ``BY_CHANNEL``, what the weights take of the state and of the inputs has a number for each column.
    """
    first, size = at * b, out * width
    for o0 in range(0, out, BLOCK_OUT):
        o = o0 + tl.arange(0, BLOCK_OUT)
        for i0 in range(0, width, BLOCK_IN):
            i = i0 + tl.arange(0, BLOCK_IN)
            for part in tl.static_range(PARTS):
                total = tl.zeros((BLOCK_OUT, BLOCK_IN), WIDE)
                for t0 in range(0, b, TOKENS):
                    t = t0 + tl.arange(0, TOKENS)
                    d = load_tokens(errors, first, t, o, b, out, WIDE)
                    d *= token_weight(write, first, t, b, part, channels, PARTS, BY_CHANNEL, WIDE)
                    a = load_tokens(inputs, first, t, i, b, width, WIDE)
                    if BY_CHANNEL and part == 0:
                        a *= channel_weights(write, first, t, i, b, width, start, channels, PARTS, WIDE)
                    total -= dot(tl.trans(d), a, OPERAND, WIDE, PRECISION)
                for other in tl.static_range(PARTS):
                    if not BY_CHANNEL:
                        share = tl.load(mix + (at * PARTS + part) * PARTS + other).to(WIDE)
                        total += share * load(stack + other * size, o, i, out, width, WIDE)
                    elif part == 0 or other == 1:
                        shares = channel_mix(mix, at, i, width, part, other, start, channels, PARTS, WIDE)
                        total += shares[None, :] * load(stack + other * size, o, i, out, width, WIDE)
                store(after + part * size, o, i, out, width, total)


@triton.jit(do_not_specialize=VARYING)
def write_kernel(
    keys, values, deltas, gain, mix, write, anchor_1, anchor_2, stack_1, stack_2,
    input_2, output_1, output_2, unclipped_1, unclipped_2, error_1, error_2,
    chunks, batch_heads, b, d_in, width, d_out,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
    CLIP: tl.constexpr, ANCHORED: tl.constexpr, BY_CHANNEL: tl.constexpr, TOKENS: tl.constexpr, FEW: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, DELTAS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Every chunk of one head. Depth 2: ``d_in -> width -> d_out``. With ``GATED``, the first layer has both products.

    Depth 1, ``width -> d_out`` with ``width = d_in``, is layer 2 alone, and ``input_2`` are the keys.
    """
    bh = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, OUT)
    gain_o = load_gain(gain, bh, o, d_out, OUT, NORM, WIDE)
    up = (1 + GATED) * width
    size_1, size_2 = up * d_in, d_out * width
    for chunk in range(chunks):
        at = chunk * batch_heads + bh
        first = at * b
        state_1, state_2 = stack_1 + at * PARTS * size_1, stack_2 + at * PARTS * size_2
        w_1, w_2 = state_1, state_2
        if ANCHORED:  # known when compiling, and the rest is not  # noqa: SIM102
            if chunk == 0:
                w_1, w_2 = anchor_1 + bh * size_1, anchor_2 + bh * size_2
        for t0 in range(0, b, TOKENS):
            _differentiate(
                keys, values, deltas, w_1, w_2, gain_o, input_2, output_1, output_2, unclipped_1, unclipped_2, error_1,
                error_2, first, t0, b, d_in, width, d_out,
                LAYERS, ACTIVATION, GATED, NORM, CLIP, TOKENS, FEW, IN, OUT, BLOCK, WIDE, FINE, FINE_PRECISION,
                LOSS, POWER, DELTA, DELTAS, SMOOTH,
            )  # fmt: skip
        tl.debug_barrier()

        # the state after the chunk
        later = (at + batch_heads) * PARTS
        next_1, next_2 = stack_1 + later * size_1, stack_2 + later * size_2
        channels = width
        if LAYERS == 2:
            channels += d_in
            _advance(state_1, next_1, mix, write, error_1, keys, up, d_in, b, at, 0, channels,
                     PARTS, BY_CHANNEL, BLOCK, IN, TOKENS, OPERAND, WIDE, PRECISION)  # fmt: skip
        _advance(state_2, next_2, mix, write, error_2, input_2, d_out, width, b, at, channels - width, channels,
                 PARTS, BY_CHANNEL, OUT, BLOCK, TOKENS, OPERAND, WIDE, PRECISION)  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=VARYING)
def rewrite_kernel(
    keys, values, deltas, gain, anchor_1, anchor_2, stack_1, stack_2,
    input_2, output_1, output_2, unclipped_1, unclipped_2, error_1, error_2,
    batch_heads, b, d_in, width, d_out,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
    CLIP: tl.constexpr, ANCHORED: tl.constexpr, TOKENS: tl.constexpr, FEW: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, FINE: tl.constexpr, FINE_PRECISION: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, DELTAS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """What ``write_kernel`` stores for ``TOKENS`` tokens, from known states: programs in any order."""
    at = tl.program_id(0).to(tl.int64)  # chunk * batch_heads + bh
    bh, o = at % batch_heads, tl.arange(0, OUT)
    gain_o = load_gain(gain, bh, o, d_out, OUT, NORM, WIDE)
    size_1, size_2 = (1 + GATED) * width * d_in, d_out * width
    w_1, w_2 = stack_1 + at * PARTS * size_1, stack_2 + at * PARTS * size_2
    if ANCHORED:  # known when compiling, and the rest is not  # noqa: SIM102
        if at < batch_heads:
            w_1, w_2 = anchor_1 + bh * size_1, anchor_2 + bh * size_2
    _differentiate(
        keys, values, deltas, w_1, w_2, gain_o, input_2, output_1, output_2, unclipped_1, unclipped_2, error_1, error_2,
        at * b, tl.program_id(1) * TOKENS, b, d_in, width, d_out,
        LAYERS, ACTIVATION, GATED, NORM, CLIP, TOKENS, FEW, IN, OUT, BLOCK, WIDE, FINE, FINE_PRECISION,
        LOSS, POWER, DELTA, DELTAS, SMOOTH,
    )  # fmt: skip


# -- the state in registers --------------------------------------------------------------------------------
#
# Weights and momentum of all layers are whole tiles that the loop over the chunks carries in registers. Nothing that is
# written is read again, so that no step waits for memory. A chunk's gradients are taken at the weights that it began
# with, while its tokens come ``TOKENS`` at a time: two generations of weights are in registers at once, the one that
# gradients are taken at and the one that they are added to. That is ``PARTS + 1`` tiles for each layer.


@triton.jit
def factor(mix, at, part, other, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """The coefficient of one part of the state at a chunk's start in another at its end."""
    return tl.load(mix + (at * PARTS + part) * PARTS + other).to(WIDE)


@triton.jit(do_not_specialize=VARYING)
def write_resident_kernel(
    keys, values, deltas, gain, mix, write, anchor_1, anchor_2, stack_1, stack_2,
    input_2, output_1, output_2, unclipped_1, unclipped_2, error_1, error_2,
    chunks, batch_heads, b, d_in, width, d_out,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    ANCHORED: tl.constexpr, TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, DELTAS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Every chunk of one head. Layers as in ``write_kernel``.

    ``x`` are the weights, ``s`` the momentum, and ``w`` the weights that the chunk's gradients are taken at.
    """
    bh = tl.program_id(0).to(tl.int64)
    i, o, h = tl.arange(0, IN), tl.arange(0, OUT), tl.arange(0, WIDTH)
    gain_o = load_gain(gain, bh, o, d_out, OUT, NORM, WIDE)
    size_1, size_2 = width * d_in, d_out * width
    x_2 = load(stack_2 + bh * PARTS * size_2, o, h, d_out, width, WIDE)
    w_2 = load(anchor_2 + bh * size_2, o, h, d_out, width, WIDE) if ANCHORED else x_2
    if LAYERS == 2:
        x_1 = load(stack_1 + bh * PARTS * size_1, h, i, width, d_in, WIDE)
        w_1 = load(anchor_1 + bh * size_1, h, i, width, d_in, WIDE) if ANCHORED else x_1
    if PARTS == 2:
        s_2 = load(stack_2 + (bh * PARTS + 1) * size_2, o, h, d_out, width, WIDE)
        if LAYERS == 2:
            s_1 = load(stack_1 + (bh * PARTS + 1) * size_1, h, i, width, d_in, WIDE)
    for chunk in range(chunks):
        at = chunk * batch_heads + bh
        first = at * b

        # the state at the chunk's end, without what its tokens add
        mix_ww = factor(mix, at, 0, 0, PARTS, WIDE)
        if PARTS == 2:
            mix_ws, mix_sw, mix_ss = (
                factor(mix, at, 0, 1, PARTS, WIDE),
                factor(mix, at, 1, 0, PARTS, WIDE),
                factor(mix, at, 1, 1, PARTS, WIDE),
            )
            x_2, s_2 = mix_ww * x_2 + mix_ws * s_2, mix_sw * x_2 + mix_ss * s_2
            if LAYERS == 2:
                x_1, s_1 = mix_ww * x_1 + mix_ws * s_1, mix_sw * x_1 + mix_ss * s_1
        else:
            x_2 = mix_ww * x_2
            if LAYERS == 2:
                x_1 = mix_ww * x_1

        for t0 in range(0, b, TOKENS):
            t = t0 + tl.arange(0, TOKENS)
            # keys forward
            if LAYERS == 2:
                k = load_tokens(keys, first, t, i, b, d_in, WIDE)
                preact = dot(k, tl.trans(w_1), FINE, WIDE, FINE_PRECISION)
                store_tokens(output_1, first, t, h, b, width, preact)
                a = activate(preact, ACTIVATION)
                store_tokens(input_2, first, t, h, b, width, a)
            else:
                a = load_tokens(input_2, first, t, h, b, width, WIDE)
                k = a
            z = dot(a, tl.trans(w_2), FINE, WIDE, FINE_PRECISION)
            store_tokens(output_2, first, t, o, b, d_out, z)

            # errors back; with a norm, keys are as wide as values
            v = load_tokens(values, first, t, o, b, d_out, WIDE)
            delta = load_deltas(deltas, first, t, b, DELTA, DELTAS, WIDE)
            error = output_error(z, k, v, delta, gain_o, o < d_out, d_out, NORM, LOSS, POWER, SMOOTH)
            error = tl.where((t < b)[:, None], error, 0.0)
            store_tokens(unclipped_2, first, t, o, b, d_out, error)
            if LAYERS == 2:
                e = dot(error, w_2, FINE, WIDE, FINE_PRECISION) * slope(preact, ACTIVATION)
                store_tokens(unclipped_1, first, t, h, b, width, e)
            if CLIP is not None:
                e_length, k_length = tl.zeros((TOKENS,), WIDE), tl.zeros((TOKENS,), WIDE)
                if LAYERS == 2:
                    e_length, k_length = row_length(e, WIDE), row_length(k, WIDE)
                norm = gradient_norm(e_length, k_length, row_length(error, WIDE), row_length(a, WIDE))
                scale = clip_scale(norm, CLIP)
                error *= scale[:, None]
                store_tokens(error_2, first, t, o, b, d_out, error)
                if LAYERS == 2:
                    e *= scale[:, None]
                    store_tokens(error_1, first, t, h, b, width, e)

            # what these tokens add, negated: the matrix unit mix_ws in place
            weight = -coefficient(write, first, t, b, 0, PARTS, WIDE)
            x_2 += dot(tl.trans(error * weight), a, OPERAND, WIDE, PRECISION)
            if LAYERS == 2:
                x_1 += dot(tl.trans(e * weight), k, OPERAND, WIDE, PRECISION)
            if PARTS == 2:
                weight_s = -coefficient(write, first, t, b, 1, PARTS, WIDE)
                s_2 += dot(tl.trans(error * weight_s), a, OPERAND, WIDE, PRECISION)
                if LAYERS == 2:
                    s_1 += dot(tl.trans(e * weight_s), k, OPERAND, WIDE, PRECISION)

        # the next chunk's state
        w_2 = x_2
        after_2 = stack_2 + (at + batch_heads) * PARTS * size_2
        store(after_2, o, h, d_out, width, x_2)
        if LAYERS == 2:
            w_1 = x_1
            after_1 = stack_1 + (at + batch_heads) * PARTS * size_1
            store(after_1, h, i, width, d_in, x_1)
        if PARTS == 2:
            store(after_2 + size_2, o, h, d_out, width, s_2)
            if LAYERS == 2:
                store(after_1 + size_1, h, i, width, d_in, s_1)
