"""The backward of writing a group of chunks: ``ChunkNetwork.write_backward`` as Triton kernels.

A program goes through the chunks of one head from the last to the first. A write contains a gradient, so its backward
is of second order: from the state after the chunk to errors and inputs; then up the layers, because errors ran down;
through the loss; and down the layers again. All of this is separate for each token, and ``TOKENS`` tokens are worked on
at a time. A last pass, tile by tile, adds up the gradient of the weights over the tokens and takes the gradient of the
state from after the chunk to before it.

``grad_error_2`` is overwritten with the gradient of the last layer's output, and ``grad_input_2`` and ``grad_error_1``
with that of the first one's and that of what comes back to it, or the other way round, for the last pass to multiply.
``write_backward_resident_kernel`` keeps the state's gradient in registers.
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
    curvature,
    dot,
    gradient_norm,
    half_error_vjp,
    length,
    load,
    load_deltas,
    load_gain,
    load_half,
    load_tokens,
    output_error_backward,
    replace,
    replace_tokens,
    row_length,
    slope,
    square_sums,
    store,
    store_half,
    store_tokens,
    through_norm,
    token_weight,
)
from .write_kernels import factor


@triton.jit
def _state_backward(mix, dmix, at, start, later, before, r, c, rows_of, columns, size,
                PARTS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A tile of the gradient of the state before a chunk, through ``mix``; and the gradient of ``mix``."""
    four = tl.arange(0, 4)
    for part in tl.static_range(PARTS):
        total = load(before + part * size, r, c, rows_of, columns, WIDE)
        here = load(start + part * size, r, c, rows_of, columns, WIDE)
        for other in tl.static_range(PARTS):
            after = load(later + other * size, r, c, rows_of, columns, WIDE)
            total += tl.load(mix + (at * PARTS + other) * PARTS + part).to(WIDE) * after
            dmix += tl.where(four == other * 2 + part, 1.0, 0.0).to(WIDE) * tl.sum(after * here)
        replace(before + part * size, r, c, rows_of, columns, total)
    return dmix


@triton.jit
def _through_channels(write, grad_write, inputs, g, first, t, i, b, width, start, channels,
                      PARTS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """From the negated gradient ``g`` of inputs times the weights of their channels: stores that of the weights, and
    returns that of the inputs, negated.
    """
    weights = channel_weights(write, first, t, i, b, width, start, channels, PARTS, WIDE)
    a = load_tokens(inputs, first, t, i, b, width, WIDE)
    to = grad_write + (first + t)[:, None] * (channels + PARTS - 1) + start + i[None, :]
    tl.store(to, -g * a, mask=(t < b)[:, None] & (i < width)[None, :])
    return g * weights


@triton.jit
def _channel_state_backward(mix, grad_mix, dend, at, start, later, before, r, c, rows_of, columns, size, begin,
                            channels, PARTS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """``_state_backward`` where decays are by channel.

    The gradient of a column's share is a sum over the rows: those after the first are added to what lies there.
    """
    after = load(later, r, c, rows_of, columns, WIDE)
    for part in tl.static_range(PARTS):
        here = load(start + part * size, r, c, rows_of, columns, WIDE)
        total = load(before + part * size, r, c, rows_of, columns, WIDE)
        total += channel_mix(mix, at, c, columns, 0, part, begin, channels, PARTS, WIDE)[None, :] * after
        if part == 1:
            of_momentum = load(later + size, r, c, rows_of, columns, WIDE)
            total += channel_mix(mix, at, c, columns, 1, 1, begin, channels, PARTS, WIDE)[None, :] * of_momentum
            dend += tl.sum(of_momentum * here)
        to = grad_mix + at * (PARTS * channels + PARTS - 1) + part * channels + begin + c
        so_far = tl.load(to, mask=(c < columns) & (c * 0 + tl.min(r, axis=0) > 0), other=0.0).to(WIDE)
        tl.debug_barrier()
        tl.store(to, so_far + tl.sum(after * here, axis=0), mask=c < columns)
        replace(before + part * size, r, c, rows_of, columns, total)
    return dend


@triton.jit
def over_tokens(total, left, right, first, r, c, b, rows_of, columns,
                 TOKENS: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``total + left^T right``: a tile of a layer's gradient."""
    for t0 in range(0, b, TOKENS):
        t = t0 + tl.arange(0, TOKENS)
        x, y = load_tokens(left, first, t, r, b, rows_of, WIDE), load_tokens(right, first, t, c, b, columns, WIDE)
        total += dot(tl.trans(x), y, OPERAND, WIDE, PRECISION)
    return total


@triton.jit(do_not_specialize=VARYING)
def write_backward_kernel(
    keys, values, deltas, gain, mix, write, anchor_1, anchor_2, stack_1, stack_2,
    input_2, output_1, output_2, unclipped_1, unclipped_2, error_1, error_2,
    grad_stack_1, grad_stack_2, grad_keys, grad_input_2, grad_error_1, grad_error_2,
    grad_values, grad_deltas, grad_write, grad_mix, grad_gain, grad_anchor_1, grad_anchor_2,
    chunks, batch_heads, b, d_in, width, d_out,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
    CLIP: tl.constexpr, ANCHORED: tl.constexpr, BY_CHANNEL: tl.constexpr, TOKENS: tl.constexpr, FEW: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, DELTAS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Every chunk of one head, the last first. The gradients that reads have left are added to where they lie."""
    bh = tl.program_id(0).to(tl.int64)
    o, four = tl.arange(0, OUT), tl.arange(0, 4)
    up = (1 + GATED) * width
    size_1, size_2 = up * d_in, d_out * width
    channels = width
    if LAYERS == 2:
        channels += d_in
    gain_o = load_gain(gain, bh, o, d_out, OUT, NORM, WIDE)
    dgain = tl.zeros((OUT,), WIDE)
    of_output_1, of_upstream = grad_input_2, grad_error_1
    if GATED:  # the outputs of the first layer are twice as wide
        of_output_1, of_upstream = grad_error_1, grad_input_2
    for done in range(chunks):
        chunk = chunks - 1 - done
        at = chunk * batch_heads + bh
        first = at * b
        state_1, state_2 = stack_1 + at * PARTS * size_1, stack_2 + at * PARTS * size_2
        before_1, before_2 = grad_stack_1 + at * PARTS * size_1, grad_stack_2 + at * PARTS * size_2
        later = (at + batch_heads) * PARTS
        later_1, later_2 = grad_stack_1 + later * size_1, grad_stack_2 + later * size_2
        w_1, w_2, grad_weights_1, grad_weights_2 = state_1, state_2, before_1, before_2
        if ANCHORED:  # known when compiling, and the rest is not  # noqa: SIM102
            if chunk == 0:
                w_1, w_2 = anchor_1 + bh * size_1, anchor_2 + bh * size_2
                grad_weights_1, grad_weights_2 = grad_anchor_1 + bh * size_1, grad_anchor_2 + bh * size_2
        for t0 in range(0, b, TOKENS):
            t = t0 + tl.arange(0, TOKENS)

            # through the state after the chunk: mix state - (write errors)^T inputs
            for part in tl.static_range(PARTS):
                weight = token_weight(write, first, t, b, part, channels, PARTS, BY_CHANNEL, WIDE)
                back = tl.zeros((TOKENS, OUT), WIDE)
                for h0 in range(0, width, BLOCK):
                    h = h0 + tl.arange(0, BLOCK)
                    after_2 = load(later_2 + part * size_2, o, h, d_out, width, WIDE)
                    a = load_tokens(input_2, first, t, h, b, width, WIDE)
                    if BY_CHANNEL and part == 0:
                        a *= channel_weights(write, first, t, h, b, width, channels - width, channels, PARTS, WIDE)
                    back += dot(a, tl.trans(after_2), OPERAND, WIDE, PRECISION)
                error = load_tokens(error_2, first, t, o, b, d_out, WIDE)
                dweight = -tl.sum(back * error, axis=1)
                derror = load_tokens(grad_error_2, first, t, o, b, d_out, WIDE)
                replace_tokens(grad_error_2, first, t, o, b, d_out, derror - back * weight)
                error *= weight
                for h0 in range(0, width, BLOCK):
                    h = h0 + tl.arange(0, BLOCK)
                    after_2 = load(later_2 + part * size_2, o, h, d_out, width, WIDE)
                    da = load_tokens(grad_input_2, first, t, h, b, width, WIDE)
                    if BY_CHANNEL and part == 0:
                        da -= _through_channels(
                            write, grad_write, input_2, dot(error, after_2, OPERAND, WIDE, PRECISION),
                            first, t, h, b, width, channels - width, channels, PARTS, WIDE,
                        )  # fmt: skip
                    else:
                        da -= dot(error, after_2, OPERAND, WIDE, PRECISION)
                    replace_tokens(grad_input_2, first, t, h, b, width, da)
                if LAYERS == 2:
                    for h0 in range(0, up, BLOCK):
                        h = h0 + tl.arange(0, BLOCK)
                        grad_scores_1 = tl.zeros((TOKENS, BLOCK), WIDE)
                        for i0 in range(0, d_in, IN):
                            i = i0 + tl.arange(0, IN)
                            k = load_tokens(keys, first, t, i, b, d_in, WIDE)
                            if BY_CHANNEL and part == 0:
                                k *= channel_weights(write, first, t, i, b, d_in, 0, channels, PARTS, WIDE)
                            after_1 = load(later_1 + part * size_1, h, i, up, d_in, WIDE)
                            grad_scores_1 += dot(k, tl.trans(after_1), OPERAND, WIDE, PRECISION)
                        e = load_tokens(error_1, first, t, h, b, up, WIDE)
                        dweight -= tl.sum(grad_scores_1 * e, axis=1)
                        de = load_tokens(grad_error_1, first, t, h, b, up, WIDE)
                        replace_tokens(grad_error_1, first, t, h, b, up, de - grad_scores_1 * weight)
                    for i0 in range(0, d_in, IN):
                        i = i0 + tl.arange(0, IN)
                        dk = load_tokens(grad_keys, first, t, i, b, d_in, WIDE)
                        through = dk
                        if BY_CHANNEL and part == 0:
                            through = tl.zeros((TOKENS, IN), WIDE)
                        for h0 in range(0, up, BLOCK):
                            h = h0 + tl.arange(0, BLOCK)
                            e = load_tokens(error_1, first, t, h, b, up, WIDE) * weight
                            after_1 = load(later_1 + part * size_1, h, i, up, d_in, WIDE)
                            through -= dot(e, after_1, OPERAND, WIDE, PRECISION)
                        if BY_CHANNEL and part == 0:
                            through = dk - _through_channels(
                                write, grad_write, keys, -through, first, t, i, b, d_in, 0, channels, PARTS, WIDE
                            )
                        replace_tokens(grad_keys, first, t, i, b, d_in, through)
                if not BY_CHANNEL:
                    tl.store(grad_write + (first + t) * PARTS + part, dweight, mask=t < b)
                elif part == 1:
                    tl.store(grad_write + (first + t) * (channels + 1) + channels, dweight, mask=t < b)
                tl.debug_barrier()

            # through errors = scale unclipped, where scale = clip / |gradient| below one
            if CLIP is not None:
                squares_2, small_2 = tl.zeros((TOKENS,), WIDE), tl.zeros((TOKENS,), WIDE)  # of the last layer's input
                squares_1, small_1 = tl.zeros((TOKENS,), WIDE), tl.zeros((TOKENS,), WIDE)  # of unclipped_1
                unclipped = load_tokens(unclipped_2, first, t, o, b, d_out, WIDE)
                derror = load_tokens(grad_error_2, first, t, o, b, d_out, WIDE)
                d_length, dscale = row_length(unclipped, WIDE), tl.sum(derror * unclipped, axis=1)
                k_squares, small_k = tl.zeros((TOKENS,), WIDE), tl.zeros((TOKENS,), WIDE)
                for h0 in range(0, width, BLOCK):
                    h = h0 + tl.arange(0, BLOCK)
                    a = load_tokens(input_2, first, t, h, b, width, WIDE)
                    more, small_more = square_sums(a, 1, WIDE)
                    squares_2 += more
                    small_2 += small_more
                if LAYERS == 2:
                    for h0 in range(0, up, BLOCK):
                        h = h0 + tl.arange(0, BLOCK)
                        e = load_tokens(unclipped_1, first, t, h, b, up, WIDE)
                        more, small_more = square_sums(e, 1, WIDE)
                        squares_1 += more
                        small_1 += small_more
                        dscale += tl.sum(load_tokens(grad_error_1, first, t, h, b, up, WIDE) * e, axis=1)
                    for i0 in range(0, d_in, IN):
                        k = load_tokens(keys, first, t, i0 + tl.arange(0, IN), b, d_in, WIDE)
                        more, small_more = square_sums(k, 1, WIDE)
                        k_squares += more
                        small_k += small_more
                k_length, a_length = length(k_squares, small_k, WIDE), length(squares_2, small_2, WIDE)
                e_length = length(squares_1, small_1, WIDE)
                norm = gradient_norm(e_length, k_length, d_length, a_length)
                scale = clip_scale(norm, CLIP)
                dnorm = tl.where(scale < 1, -4 * dscale * scale, 0.0)
                norm = tl.maximum(norm, CLIP)
                unclipped = load_tokens(unclipped_2, first, t, o, b, d_out, WIDE)
                derror = load_tokens(grad_error_2, first, t, o, b, d_out, WIDE) * scale[:, None]
                derror += through_norm(unclipped, a_length / norm, dnorm)
                replace_tokens(grad_error_2, first, t, o, b, d_out, derror)
                tl.debug_barrier()

            # errors run down the layers, so their gradient runs up ...
            if LAYERS == 2:
                derror = load_tokens(grad_error_2, first, t, o, b, d_out, WIDE)
                for h0 in range(0, width, BLOCK):
                    h = h0 + tl.arange(0, BLOCK)
                    preact = load_half(output_1, 0, first, t, h, b, width, GATED, WIDE)
                    dupstream = tl.zeros((TOKENS, BLOCK), WIDE)
                    for half in tl.static_range(1 + GATED):
                        de = load_half(grad_error_1, half, first, t, h, b, width, GATED, WIDE)
                        if CLIP is not None:
                            e = load_half(unclipped_1, half, first, t, h, b, width, GATED, WIDE)
                            de = de * scale[:, None] + through_norm(e, k_length / norm, dnorm)
                            tl.debug_barrier()
                            store_half(grad_error_1, half, first, t, h, b, width, de, GATED)
                        if half:
                            dupstream += de * activate(preact, ACTIVATION)
                        elif GATED:
                            gate = load_half(output_1, 1, first, t, h, b, width, GATED, WIDE)
                            dupstream = de * slope(preact, ACTIVATION) * gate
                        else:
                            dupstream = de * slope(preact, ACTIVATION)
                    w = load(w_2, o, h, d_out, width, WIDE)
                    derror += dot(dupstream, tl.trans(w), OPERAND, WIDE, PRECISION)
                replace_tokens(grad_error_2, first, t, o, b, d_out, derror)
                tl.debug_barrier()

            # ... through the loss, whose backward has many tiles: ``FEW`` tokens at a time ...
            for s0 in range(t0, t0 + TOKENS, FEW):
                s = s0 + tl.arange(0, FEW)
                derror_s = load_tokens(grad_error_2, first, s, o, b, d_out, WIDE)
                z_s = load_tokens(output_2, first, s, o, b, d_out, WIDE)
                v_s = load_tokens(values, first, s, o, b, d_out, WIDE)
                delta_s = load_deltas(deltas, first, s, b, DELTA, DELTAS, WIDE)
                if NORM:
                    unclipped_s = load_tokens(unclipped_2, first, s, o, b, d_out, WIDE)
                    residual_s = load_tokens(keys, first, s, o, b, d_in, WIDE)
                    g_s, dresidual_out, dv_s, ddelta_s, dgains_s = output_error_backward(
                        derror_s, unclipped_s, z_s, residual_s, v_s, delta_s, gain_o, o < d_out, d_out,
                        LOSS, POWER, SMOOTH,
                    )  # fmt: skip
                    dgain += tl.sum(tl.where((s < b)[:, None], dgains_s, 0.0), axis=0)
                    # a residual network is as wide at its end as at its beginning
                    dresidual = load_tokens(grad_keys, first, s, o, b, d_in, WIDE) + dresidual_out
                    replace_tokens(grad_keys, first, s, o, b, d_in, dresidual)
                else:
                    g_s, dv_s, ddelta_s = half_error_vjp(derror_s, z_s, v_s, delta_s, LOSS, POWER, SMOOTH)
                if DELTAS:
                    tl.store(grad_deltas + first + s, ddelta_s, mask=s < b)
                store_tokens(grad_values, first, s, o, b, d_out, dv_s)
                replace_tokens(grad_error_2, first, s, o, b, d_out, g_s)
            tl.debug_barrier()

            # ... and then the inputs' gradient runs down
            g = load_tokens(grad_error_2, first, t, o, b, d_out, WIDE)
            for h0 in range(0, width, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                w = load(w_2, o, h, d_out, width, WIDE)
                da = dot(g, w, OPERAND, WIDE, PRECISION)
                if LAYERS == 2:
                    unclipped = load_tokens(unclipped_2, first, t, o, b, d_out, WIDE)
                    upstream = dot(unclipped, w, OPERAND, WIDE, PRECISION)
                da += load_tokens(grad_input_2, first, t, h, b, width, WIDE)
                if CLIP is not None:
                    a = load_tokens(input_2, first, t, h, b, width, WIDE)
                    da += through_norm(a, d_length / norm, dnorm)
                if LAYERS == 2:
                    preact = load_half(output_1, 0, first, t, h, b, width, GATED, WIDE)
                    de = load_half(grad_error_1, 0, first, t, h, b, width, GATED, WIDE)
                    rise = slope(preact, ACTIVATION)
                    if GATED:
                        gate = load_half(output_1, 1, first, t, h, b, width, GATED, WIDE)
                        de_gate = load_half(grad_error_1, 1, first, t, h, b, width, GATED, WIDE)
                        tl.debug_barrier()
                        bent = de * gate * curvature(preact, ACTIVATION) + de_gate * rise
                        store_half(grad_error_1, 0, first, t, h, b, width, da * rise * gate + upstream * bent, GATED)
                        dgate = da * activate(preact, ACTIVATION) + upstream * de * rise
                        store_half(grad_error_1, 1, first, t, h, b, width, dgate, GATED)
                        da = de * rise * gate + de_gate * activate(preact, ACTIVATION)
                    else:
                        da = da * rise + de * upstream * curvature(preact, ACTIVATION)
                        replace_tokens(grad_error_1, first, t, h, b, width, de * rise)
                replace_tokens(grad_input_2, first, t, h, b, width, da)
            tl.debug_barrier()
            if LAYERS == 2:
                for i0 in range(0, d_in, IN):
                    i = i0 + tl.arange(0, IN)
                    dk = load_tokens(grad_keys, first, t, i, b, d_in, WIDE)
                    if CLIP is not None:
                        k = load_tokens(keys, first, t, i, b, d_in, WIDE)
                        dk += through_norm(k, e_length / norm, dnorm)
                    for h0 in range(0, up, BLOCK):
                        h = h0 + tl.arange(0, BLOCK)
                        dz = load_tokens(of_output_1, first, t, h, b, up, WIDE)
                        dk += dot(dz, load(w_1, h, i, up, d_in, WIDE), OPERAND, WIDE, PRECISION)
                    replace_tokens(grad_keys, first, t, i, b, d_in, dk)
                tl.debug_barrier()

        # the gradients of weights and state, over all of the chunk's tokens
        dmix, dend = tl.zeros((4,), WIDE), tl.zeros((1,), WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            if BY_CHANNEL:
                dend = _channel_state_backward(mix, grad_mix, dend, at, state_2, later_2, before_2, o, h, d_out, width,
                                               size_2, channels - width, channels, PARTS, WIDE)  # fmt: skip
            else:
                dmix = _state_backward(
                    mix, dmix, at, state_2, later_2, before_2, o, h, d_out, width, size_2, PARTS, WIDE
                )
            tl.debug_barrier()
            dw = load(grad_weights_2, o, h, d_out, width, WIDE)
            dw = over_tokens(dw, grad_error_2, input_2, first, o, h, b, d_out, width,
                                TOKENS, OPERAND, WIDE, PRECISION)  # fmt: skip
            if LAYERS == 2:
                dw = over_tokens(dw, unclipped_2, of_upstream, first, o, h, b, d_out, width,
                                    TOKENS, OPERAND, WIDE, PRECISION)  # fmt: skip
            replace(grad_weights_2, o, h, d_out, width, dw)
        if LAYERS == 2:
            for h0 in range(0, up, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                for i0 in range(0, d_in, IN):
                    i = i0 + tl.arange(0, IN)
                    if BY_CHANNEL:
                        dend = _channel_state_backward(mix, grad_mix, dend, at, state_1, later_1, before_1, h, i, up,
                                                       d_in, size_1, 0, channels, PARTS, WIDE)  # fmt: skip
                    else:
                        dmix = _state_backward(mix, dmix, at, state_1, later_1, before_1, h, i, up, d_in, size_1,
                                             PARTS, WIDE)  # fmt: skip
                    tl.debug_barrier()
                    dw_1 = load(grad_weights_1, h, i, up, d_in, WIDE)
                    dw_1 = over_tokens(dw_1, of_output_1, keys, first, h, i, b, up, d_in,
                                        TOKENS, OPERAND, WIDE, PRECISION)  # fmt: skip
                    replace(grad_weights_1, h, i, up, d_in, dw_1)
        if not BY_CHANNEL:
            tl.store(grad_mix + (at * PARTS + four // 2) * PARTS + four % 2, dmix,
                     mask=(four // 2 < PARTS) & (four % 2 < PARTS))  # fmt: skip
        elif PARTS == 2:
            tl.store(grad_mix + (at + 1) * (2 * channels + 1) - 1 + tl.arange(0, 1), dend)
        tl.debug_barrier()
    if NORM:
        tl.store(grad_gain + bh * d_out + o, dgain, mask=o < d_out)


# -- the state's gradient in registers ---------------------------------------------------------------------
#
# The gradient of the state after the chunk, weights and momentum of all layers, is in tiles that the loop over the
# chunks carries. Beside these ``PARTS`` tiles of each layer there are the weights that the chunk's gradients were taken
# at, and their own gradient: ``PARTS + 2`` in all.


@triton.jit
def _add_dmix(dmix, after, here, part, other):
    """Adds to ``dmix`` that of ``other`` of the state before the chunk in ``part`` of the state after it."""
    return dmix + tl.where(tl.arange(0, 4) == part * 2 + other, 1.0, 0.0).to(dmix.dtype) * tl.sum(after * here)


@triton.jit(do_not_specialize=VARYING)
def write_backward_resident_kernel(
    keys, values, deltas, gain, mix, write, anchor_1, anchor_2, stack_1, stack_2,
    input_2, output_1, output_2, unclipped_1, unclipped_2, error_1, error_2,
    grad_stack_1, grad_stack_2, grad_keys, grad_input_2, grad_error_1, grad_error_2,
    grad_values, grad_deltas, grad_write, grad_mix, grad_gain, grad_anchor_1, grad_anchor_2,
    chunks, batch_heads, b, d_in, width, d_out,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    ANCHORED: tl.constexpr, TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, DELTAS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Every chunk of one head, the last first. Of the gradients that reads have left, only the first state's grows.

    ``g`` is the gradient of the weights after the chunk, ``r`` that of the momentum. At depth 1 ``grad_input_2`` is the
    keys' gradient.
    """
    bh = tl.program_id(0).to(tl.int64)
    i, o, h, four = tl.arange(0, IN), tl.arange(0, OUT), tl.arange(0, WIDTH), tl.arange(0, 4)
    size_1, size_2 = width * d_in, d_out * width
    gain_o = load_gain(gain, bh, o, d_out, OUT, NORM, WIDE)
    dgain = tl.zeros((OUT,), WIDE)
    last = chunks * batch_heads + bh
    g_2 = load(grad_stack_2 + last * PARTS * size_2, o, h, d_out, width, WIDE)
    if LAYERS == 2:
        g_1 = load(grad_stack_1 + last * PARTS * size_1, h, i, width, d_in, WIDE)
    if PARTS == 2:
        r_2 = load(grad_stack_2 + (last * PARTS + 1) * size_2, o, h, d_out, width, WIDE)
        if LAYERS == 2:
            r_1 = load(grad_stack_1 + (last * PARTS + 1) * size_1, h, i, width, d_in, WIDE)
    for done in range(chunks):
        chunk = chunks - 1 - done
        at = chunk * batch_heads + bh
        first = at * b
        state_1, state_2 = stack_1 + at * PARTS * size_1, stack_2 + at * PARTS * size_2
        before_1, before_2 = grad_stack_1 + at * PARTS * size_1, grad_stack_2 + at * PARTS * size_2

        # the gradient of mix
        w_2 = load(state_2, o, h, d_out, width, WIDE)
        dmix = _add_dmix(tl.zeros((4,), WIDE), g_2, w_2, 0, 0)
        if LAYERS == 2:
            w_1 = load(state_1, h, i, width, d_in, WIDE)
            dmix = _add_dmix(dmix, g_1, w_1, 0, 0)
        if PARTS == 2:
            s = load(state_2 + size_2, o, h, d_out, width, WIDE)
            dmix = _add_dmix(_add_dmix(_add_dmix(dmix, g_2, s, 0, 1), r_2, w_2, 1, 0), r_2, s, 1, 1)
            if LAYERS == 2:
                s = load(state_1 + size_1, h, i, width, d_in, WIDE)
                dmix = _add_dmix(_add_dmix(_add_dmix(dmix, g_1, s, 0, 1), r_1, w_1, 1, 0), r_1, s, 1, 1)
        tl.store(grad_mix + (at * PARTS + four // 2) * PARTS + four % 2, dmix,
                 mask=(four // 2 < PARTS) & (four % 2 < PARTS))  # fmt: skip
        if ANCHORED:
            w_2 = load(tl.where(chunk == 0, anchor_2 + bh * size_2, state_2), o, h, d_out, width, WIDE)
            if LAYERS == 2:
                w_1 = load(tl.where(chunk == 0, anchor_1 + bh * size_1, state_1), h, i, width, d_in, WIDE)

        dw_2 = tl.zeros((OUT, WIDTH), WIDE)
        if LAYERS == 2:
            dw_1 = tl.zeros((WIDTH, IN), WIDE)
        for t0 in range(0, b, TOKENS):
            t = t0 + tl.arange(0, TOKENS)
            valid = (t < b)[:, None]
            unclipped = load_tokens(unclipped_2, first, t, o, b, d_out, WIDE)
            a = load_tokens(input_2, first, t, h, b, width, WIDE)
            k = a
            if LAYERS == 2:
                k = load_tokens(keys, first, t, i, b, d_in, WIDE)
                unclipped_hidden = load_tokens(unclipped_1, first, t, h, b, width, WIDE)
            error = unclipped
            if CLIP is not None:
                error = load_tokens(error_2, first, t, o, b, d_out, WIDE)

            # through the state after the chunk: mix state - (write errors)^T inputs
            weight = -coefficient(write, first, t, b, 0, PARTS, WIDE)
            back = dot(a, tl.trans(g_2), OPERAND, WIDE, PRECISION)
            dweight = -tl.sum(back * error, axis=1)
            derror = load_tokens(grad_error_2, first, t, o, b, d_out, WIDE) + back * weight
            da = load_tokens(grad_input_2, first, t, h, b, width, WIDE)
            da += dot(error * weight, g_2, OPERAND, WIDE, PRECISION)
            if PARTS == 2:
                weight_s = -coefficient(write, first, t, b, 1, PARTS, WIDE)
                back = dot(a, tl.trans(r_2), OPERAND, WIDE, PRECISION)
                dweight_s = -tl.sum(back * error, axis=1)
                derror += back * weight_s
                da += dot(error * weight_s, r_2, OPERAND, WIDE, PRECISION)
            if LAYERS == 2:
                e = unclipped_hidden
                if CLIP is not None:
                    e = load_tokens(error_1, first, t, h, b, width, WIDE)
                grad_scores_1 = dot(k, tl.trans(g_1), OPERAND, WIDE, PRECISION)
                dweight -= tl.sum(grad_scores_1 * e, axis=1)
                de = load_tokens(grad_error_1, first, t, h, b, width, WIDE) + grad_scores_1 * weight
                dk = load_tokens(grad_keys, first, t, i, b, d_in, WIDE)
                dk += dot(e * weight, g_1, OPERAND, WIDE, PRECISION)
                if PARTS == 2:
                    grad_scores_1 = dot(k, tl.trans(r_1), OPERAND, WIDE, PRECISION)
                    dweight_s -= tl.sum(grad_scores_1 * e, axis=1)
                    de += grad_scores_1 * weight_s
                    dk += dot(e * weight_s, r_1, OPERAND, WIDE, PRECISION)
            tl.store(grad_write + (first + t) * PARTS, dweight, mask=t < b)
            if PARTS == 2:
                tl.store(grad_write + (first + t) * PARTS + 1, dweight_s, mask=t < b)

            # through errors = scale unclipped, where scale = clip / |gradient| below one
            if CLIP is not None:
                d_length, a_length, dscale = (
                    row_length(unclipped, WIDE),
                    row_length(a, WIDE),
                    tl.sum(derror * unclipped, axis=1),
                )
                e_length, k_length = tl.zeros((TOKENS,), WIDE), tl.zeros((TOKENS,), WIDE)
                if LAYERS == 2:
                    e_length, k_length = row_length(unclipped_hidden, WIDE), row_length(k, WIDE)
                    dscale += tl.sum(de * unclipped_hidden, axis=1)
                norm = gradient_norm(e_length, k_length, d_length, a_length)
                scale = clip_scale(norm, CLIP)
                dnorm = tl.where(scale < 1, -4 * dscale * scale, 0.0)
                norm = tl.maximum(norm, CLIP)
                derror = derror * scale[:, None] + through_norm(unclipped, a_length / norm, dnorm)
                da += through_norm(a, d_length / norm, dnorm)
                if LAYERS == 2:
                    de = de * scale[:, None] + through_norm(unclipped_hidden, k_length / norm, dnorm)
                    dk += through_norm(k, e_length / norm, dnorm)

            # errors run down the layers, so their gradient runs up ...
            if LAYERS == 2:
                preact = load_tokens(output_1, first, t, h, b, width, WIDE)
                rise = slope(preact, ACTIVATION)
                grad_upstream = de * rise
                derror += dot(grad_upstream, tl.trans(w_2), OPERAND, WIDE, PRECISION)
                dw_2 += dot(tl.trans(unclipped), grad_upstream, OPERAND, WIDE, PRECISION)

            # ... through the loss ...
            z = load_tokens(output_2, first, t, o, b, d_out, WIDE)
            v = load_tokens(values, first, t, o, b, d_out, WIDE)
            delta = load_deltas(deltas, first, t, b, DELTA, DELTAS, WIDE)
            if NORM:
                g, dresidual_out, dv, ddelta, dgains = output_error_backward(
                    derror, unclipped, z, k, v, delta, gain_o, o < d_out, d_out, LOSS, POWER, SMOOTH
                )
                dgain += tl.sum(tl.where(valid, dgains, 0.0), axis=0)
                if LAYERS == 2:  # with a norm, keys are as wide as values
                    dk += dresidual_out
                else:
                    da += dresidual_out
            else:
                g, dv, ddelta = half_error_vjp(derror, z, v, delta, LOSS, POWER, SMOOTH)
            if DELTAS:
                tl.store(grad_deltas + first + t, ddelta, mask=t < b)
            store_tokens(grad_values, first, t, o, b, d_out, dv)
            g = tl.where(valid, g, 0.0)

            # ... and then the inputs' gradient runs down
            dw_2 += dot(tl.trans(g), a, OPERAND, WIDE, PRECISION)
            da += dot(g, w_2, OPERAND, WIDE, PRECISION)
            if LAYERS == 2:
                upstream = dot(unclipped, w_2, OPERAND, WIDE, PRECISION)
                da = tl.where(valid, da * rise + de * upstream * curvature(preact, ACTIVATION), 0.0)
                dw_1 += dot(tl.trans(da), k, OPERAND, WIDE, PRECISION)
                dk += dot(da, w_1, OPERAND, WIDE, PRECISION)
                replace_tokens(grad_keys, first, t, i, b, d_in, dk)
            else:
                replace_tokens(grad_input_2, first, t, h, b, width, da)

        # the weights' own gradient is added to the chunk's start, or to the anchor's
        if ANCHORED:
            grad_weights_2, high_2 = grad_anchor_2 + bh * size_2, tl.where(chunk == 0, d_out, 0)
            replace(grad_weights_2, o, h, high_2, width, load(grad_weights_2, o, h, high_2, width, WIDE) + dw_2)
            dw_2 = tl.where(chunk == 0, 0.0, dw_2)
            if LAYERS == 2:
                grad_weights_1, high_1 = grad_anchor_1 + bh * size_1, tl.where(chunk == 0, width, 0)
                replace(grad_weights_1, h, i, high_1, d_in, load(grad_weights_1, h, i, high_1, d_in, WIDE) + dw_1)
                dw_1 = tl.where(chunk == 0, 0.0, dw_1)

        # the state's gradient, from after the chunk to before it
        mix_ww = factor(mix, at, 0, 0, PARTS, WIDE)
        dw_2 += load(before_2, o, h, d_out, width, WIDE) + mix_ww * g_2
        if LAYERS == 2:
            dw_1 += load(before_1, h, i, width, d_in, WIDE) + mix_ww * g_1
        if PARTS == 2:
            mix_ws, mix_sw, mix_ss = (
                factor(mix, at, 0, 1, PARTS, WIDE),
                factor(mix, at, 1, 0, PARTS, WIDE),
                factor(mix, at, 1, 1, PARTS, WIDE),
            )
            dw_2 += mix_sw * r_2
            r_2 = load(before_2 + size_2, o, h, d_out, width, WIDE) + mix_ws * g_2 + mix_ss * r_2
            if LAYERS == 2:
                dw_1 += mix_sw * r_1
                r_1 = load(before_1 + size_1, h, i, width, d_in, WIDE) + mix_ws * g_1 + mix_ss * r_1
        g_2 = dw_2
        if LAYERS == 2:
            g_1 = dw_1

    store(grad_stack_2 + bh * PARTS * size_2, o, h, d_out, width, g_2)
    if LAYERS == 2:
        store(grad_stack_1 + bh * PARTS * size_1, h, i, width, d_in, g_1)
    if PARTS == 2:
        store(grad_stack_2 + (bh * PARTS + 1) * size_2, o, h, d_out, width, r_2)
        if LAYERS == 2:
            store(grad_stack_1 + (bh * PARTS + 1) * size_1, h, i, width, d_in, r_1)
    if NORM:
        tl.store(grad_gain + bh * d_out + o, dgain, mask=o < d_out)
