"""A memory of one matrix: a group of chunks written and read in one launch, and its backward in two.

A program of forward goes through the chunks of one head of one batch row, with weights and momentum in registers. It
takes all tokens of a chunk at once: the errors of the keys at the weights that the chunk starts with, the queries at
these weights and at what the chunk has written, and the state after it. Queries, keys, values and outputs are where the
model has them. In global memory there are, beside these, the decay matrices and, for backward, the states.

Operands are rounded as in ``write_kernels.py`` and ``read_kernels.py``, whose notes say why some are ``FINE``.

Triton lays out a product whose result is an operand of another one with all warps along its rows. Of 64 rows, each
group of four warps would then compute all. A product in a loop is none whose result the compiler knows to be an
operand, and so products are in loops of as many rounds as ``once`` says, which is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_runtime import VARYING
from .read_kernels import confined, weighted_scores
from .tiles import (
    as_bfloat16,
    clip_scale,
    coefficient,
    dot,
    gradient_norm,
    half_error_vjp,
    layer_norm,
    layer_norm_vjp,
    load,
    load_gain,
    load_rows,
    load_tokens,
    output_error,
    output_error_backward,
    row_length,
    store,
    store_rows,
    store_tokens,
    through_norm,
)
from .write_kernels import factor


@triton.jit
def _product(a, b, once, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """``dot``, in a loop of one round."""
    total = tl.zeros((a.shape[0], b.shape[1]), WIDE)
    for _ in range(once):
        total += dot(a.to(WIDE), b.to(WIDE), OPERAND, WIDE, PRECISION)
    return total


@triton.jit
def _in_halves(a, b, once, WIDE: tl.constexpr):
    """``a b`` in two products, where one has the digits of bfloat16 and the other is taken apart."""
    total = tl.zeros((a.shape[0], b.shape[1]), WIDE)
    if a.dtype == tl.bfloat16:
        rest = b
        for _ in range(2 * once):
            total += dot(a.to(WIDE), rest, tl.bfloat16, WIDE, "ieee")
            rest -= as_bfloat16(rest)
    else:
        rest = a
        for _ in range(2 * once):
            total += dot(rest, b.to(WIDE), tl.bfloat16, WIDE, "ieee")
            rest -= as_bfloat16(rest)
    return total


@triton.jit
def _fine(a, b, once, FINE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """A fine product; bfloat16 of a model is exact, and takes two products in place of three."""
    if PRECISION != "bf16x3":
        total = _product(a, b, once, FINE, WIDE, PRECISION)
    elif a.dtype == tl.bfloat16 or b.dtype == tl.bfloat16:
        total = _in_halves(a, b, once, WIDE)
    else:
        a, b = a.to(WIDE), b.to(WIDE)
        high = as_bfloat16(a)
        total = _product(a - high, b, once, tl.bfloat16, WIDE, "ieee")
        total += _in_halves(high.to(tl.bfloat16), b, once, WIDE)
    return total


@triton.jit
def _errors(k, v, w, gain_o, s, o, b, once, d_out,
            NORM: tl.constexpr, CLIP: tl.constexpr, WIDE: tl.constexpr, FINE: tl.constexpr,
            FINE_PRECISION: tl.constexpr, LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr,
            SMOOTH: tl.constexpr):  # fmt: skip
    """The outputs at the keys, and their half errors before and after clipping."""
    z = _fine(k, tl.trans(w), once, FINE, WIDE, FINE_PRECISION)
    residual = z
    if NORM:  # then keys are as wide as values
        residual = k.to(WIDE)
    delta = tl.full((k.shape[0], 1), DELTA, WIDE)
    unclipped = output_error(z, residual, v.to(WIDE), delta, gain_o, o < d_out, d_out, NORM, LOSS, POWER, SMOOTH)
    unclipped = tl.where((s < b)[:, None], unclipped, 0.0)
    error = unclipped
    if CLIP is not None:
        none = tl.zeros((k.shape[0],), WIDE)
        norm = gradient_norm(none, none, row_length(error, WIDE), row_length(k.to(WIDE), WIDE))
        error *= clip_scale(norm, CLIP)[:, None]
    return z, unclipped, error


@triton.jit
def _read(q, weighted, error, x, m, carry, first, s, b, once,
          PARTS: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
          FINE_PRECISION: tl.constexpr):  # fmt: skip
    """The outputs at the queries."""
    z = coefficient(carry, first, s, b, 0, PARTS, WIDE) * _fine(q, tl.trans(x), once, FINE, WIDE, FINE_PRECISION)
    if PARTS == 2:
        product = _fine(q, tl.trans(m), once, FINE, WIDE, FINE_PRECISION)
        z += coefficient(carry, first, s, b, 1, PARTS, WIDE) * product
    finite, poison = confined(weighted, error, s, s, OPERAND, WIDE)
    z -= _product(weighted, finite, once, OPERAND, WIDE, PRECISION)
    return tl.where(poison > 0, float("nan"), z)


@triton.jit
def _advance(x, m, k, error, write, mix, at, s, b, once,
             PARTS: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Weights and momentum after a chunk. No part of the momentum comes from the weights."""
    x = factor(mix, at, 0, 0, PARTS, WIDE) * x
    if PARTS == 2:
        x += factor(mix, at, 0, 1, PARTS, WIDE) * m
        m = factor(mix, at, 1, 1, PARTS, WIDE) * m
        weight_m = -coefficient(write, at * b, s, b, 1, PARTS, WIDE)
        m += _product(tl.trans(error * weight_m), k, once, OPERAND, WIDE, PRECISION)
    weight = -coefficient(write, at * b, s, b, 0, PARTS, WIDE)
    x += _product(tl.trans(error * weight), k, once, OPERAND, WIDE, PRECISION)
    return x, m


@triton.jit(do_not_specialize=VARYING)
def linear_kernel(
    queries, keys, values, gain, read, carry, write, mix, anchor, states, y,
    chunks, once, time, b, heads,
    q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head,
    PARTS: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, ANCHORED: tl.constexpr, KEEP: tl.constexpr,
    READS: tl.constexpr,
    width: tl.constexpr, d_out: tl.constexpr, TOKENS: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Every chunk of one head, and its reads if ``READS``. ``states`` begin with the first chunk's, and with ``KEEP``
    get that after each chunk, else only that after the last.

    ``x`` are the weights, ``m`` the momentum, and ``w`` the weights that the chunk's gradients are taken at.
    """
    bh = tl.program_id(0).to(tl.int64)
    row, head, batch_heads, size = bh // heads, bh % heads, tl.num_programs(0), d_out * width
    s, o, h = tl.arange(0, TOKENS), tl.arange(0, OUT), tl.arange(0, WIDTH)
    queries += row * q_row + head * q_head
    keys += row * k_row + head * k_head
    values += row * v_row + head * v_head
    y += (row * time * heads + head) * d_out
    states += bh * PARTS * size
    step = batch_heads.to(tl.int64) * PARTS * size
    gain_o = load_gain(gain, head, o, d_out, OUT, NORM, WIDE)
    x = load(states, o, h, d_out, width, WIDE)
    w = load(anchor + bh * size, o, h, d_out, width, WIDE) if ANCHORED else x
    m = load(states + size, o, h, d_out, width, WIDE) if PARTS == 2 else x
    for chunk in range(chunks):
        at = chunk * batch_heads + bh
        first, began = at * b, tl.cast(chunk * b, tl.int64)
        k = load_rows(keys + began * k_step, s, h, b, width, k_step)
        v = load_rows(values + began * v_step, s, o, b, d_out, v_step)
        _, _, error = _errors(k, v, w, gain_o, s, o, b, once, d_out,
                              NORM, CLIP, WIDE, FINE, FINE_PRECISION, LOSS, POWER, DELTA, SMOOTH)  # fmt: skip
        if READS:
            q = load_rows(queries + began * q_step, s, h, b, width, q_step)
            scores = _product(q, tl.trans(k), once, OPERAND, WIDE, PRECISION)
            weighted = weighted_scores(scores, load_tokens(read, first, s, s, b, b, WIDE))
            z = _read(q, weighted, error, x, m, carry, first, s, b, once,
                      PARTS, OPERAND, WIDE, PRECISION, FINE, FINE_PRECISION)  # fmt: skip
            if NORM:
                z = q + layer_norm(z, o < d_out, d_out)[0] * gain_o[None, :]
            store_rows(y + began * heads * d_out, s, o, b, d_out, heads * d_out, z)
        x, m = _advance(x, m, k, error, write, mix, at, s, b, once, PARTS, OPERAND, WIDE, PRECISION)
        w = x
        if KEEP:
            states += step
            store(states, o, h, d_out, width, x)
            if PARTS == 2:
                store(states + size, o, h, d_out, width, m)
    if not KEEP:
        store(states + step, o, h, d_out, width, x)
        if PARTS == 2:
            store(states + step + size, o, h, d_out, width, m)


# -- backward ----------------------------------------------------------------------------------------------
#
# Two launches. The first is that of the reads, whose programs have one chunk of one head each, and no order. It stores
# what the reads leave to the second as gradients of errors, keys and states. The second goes through the chunks of a
# head from the last to the first, with the gradient of the state in registers. Both compute the errors again.


@triton.jit(do_not_specialize=VARYING)
def linear_read_backward_kernel(
    grad_y, queries, keys, values, gain, read, carry, anchor, states,
    grad_queries, grad_key_parts, grad_errors, grad_states, grad_read, grad_carry, grad_gain,
    batch_heads, once, time, b, heads,
    y_row, y_step, y_head, q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head,
    PARTS: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, ANCHORED: tl.constexpr,
    width: tl.constexpr, d_out: tl.constexpr, TOKENS: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """One chunk of one head. ``grad_key_parts``, ``grad_errors`` and ``grad_states`` are laid out as the decays."""
    at = tl.program_id(0).to(tl.int64)  # chunk * batch_heads + bh
    chunk, bh = at // batch_heads, at % batch_heads
    row, head, first, began, size = bh // heads, bh % heads, at * b, chunk * b, d_out * width
    s, o, h = tl.arange(0, TOKENS), tl.arange(0, OUT), tl.arange(0, WIDTH)
    queries += row * q_row + head * q_head + began * q_step
    keys += row * k_row + head * k_head + began * k_step
    values += row * v_row + head * v_head + began * v_step
    grad_y += row * y_row + head * y_head + began * y_step
    grad_queries += ((row * time + began) * heads + head) * width
    gain_o = load_gain(gain, head, o, d_out, OUT, NORM, WIDE)
    state = states + at * PARTS * size
    k = load_rows(keys, s, h, b, width, k_step)
    v = load_rows(values, s, o, b, d_out, v_step)
    start = state
    if ANCHORED:
        start = tl.where(chunk == 0, anchor + bh * size, state)
    w = load(start, o, h, d_out, width, WIDE)
    _, _, error = _errors(k, v, w, gain_o, s, o, b, once, d_out,
                          NORM, CLIP, WIDE, FINE, FINE_PRECISION, LOSS, POWER, DELTA, SMOOTH)  # fmt: skip
    q = load_rows(queries, s, h, b, width, q_step)
    g = load_rows(grad_y, s, o, b, d_out, y_step)
    scores = _product(q, tl.trans(k), once, OPERAND, WIDE, PRECISION)
    weighted = weighted_scores(scores, load_tokens(read, first, s, s, b, b, WIDE))
    if NORM:
        x = load(state, o, h, d_out, width, WIDE)
        m = load(state + size, o, h, d_out, width, WIDE) if PARTS == 2 else x
        z = _read(q, weighted, error, x, m, carry, first, s, b, once,
                  PARTS, OPERAND, WIDE, PRECISION, FINE, FINE_PRECISION)  # fmt: skip
        n, inverse = layer_norm(z, o < d_out, d_out)
        tl.store(grad_gain + at * d_out + o, tl.sum(g * n, axis=0), mask=o < d_out)
        g = layer_norm_vjp(g * gain_o[None, :], n, inverse, o < d_out, d_out)
    grad = _product(tl.trans(weighted), g, once, OPERAND, WIDE, PRECISION)
    store_tokens(grad_errors, first, s, o, b, d_out, -grad)
    dscores = -_fine(g, tl.trans(error), once, FINE, WIDE, FINE_PRECISION)
    store_tokens(grad_read, first, s, s, b, b, dscores * scores)
    dscores *= load_tokens(read, first, s, s, b, b, WIDE)
    grad = _product(tl.trans(dscores), q, once, OPERAND, WIDE, PRECISION)
    store_tokens(grad_key_parts, first, s, h, b, width, grad)
    dq = _fine(dscores, k, once, FINE, WIDE, FINE_PRECISION)
    # the output has no part along g, if the coefficients' gradients multiply the inputs as forward rounded them
    for part in tl.static_range(PARTS):
        weight = coefficient(carry, first, s, b, part, PARTS, WIDE)
        back = _fine(g, load(state + part * size, o, h, d_out, width, WIDE), once, FINE, WIDE, FINE_PRECISION)
        tl.store(grad_carry + (first + s) * PARTS + part, tl.sum(q * back, axis=1), mask=s < b)
        dq += weight * back
        grad = _fine(tl.trans(g * weight), q, once, FINE, WIDE, FINE_PRECISION)
        store(grad_states + (at * PARTS + part) * size, o, h, d_out, width, grad)
    if NORM:  # of the residual
        dq += load_rows(grad_y, s, o, b, d_out, y_step)
    store_rows(grad_queries, s, h, b, width, heads * width, dq)


@triton.jit(do_not_specialize=VARYING)
def linear_write_backward_kernel(
    keys, values, gain, write, mix, anchor, states, grad_errors, grad_key_parts, grad_states, grad_state,
    grad_keys, grad_values, grad_gain, grad_write, grad_mix, grad_anchor,
    chunks, once, time, b, heads,
    k_row, k_step, k_head, v_row, v_step, v_head,
    PARTS: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, ANCHORED: tl.constexpr,
    width: tl.constexpr, d_out: tl.constexpr, TOKENS: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Every chunk of one head, the last first. ``grad_state``: of the state after the chunks, and then of that before.

    ``gx`` and ``gm`` are the gradients of weights and momentum.
    """
    bh = tl.program_id(0).to(tl.int64)
    row, head, batch_heads, size = bh // heads, bh % heads, tl.num_programs(0), d_out * width
    s, o, h, four = tl.arange(0, TOKENS), tl.arange(0, OUT), tl.arange(0, WIDTH), tl.arange(0, 4)
    keys += row * k_row + head * k_head
    values += row * v_row + head * v_head
    grad_keys += (row * time * heads + head) * width
    grad_values += (row * time * heads + head) * d_out
    gain_o = load_gain(gain, head, o, d_out, OUT, NORM, WIDE)
    dgain = tl.zeros((OUT,), WIDE)
    grad_state += bh * PARTS * size
    gx = load(grad_state, o, h, d_out, width, WIDE)
    gm = load(grad_state + size, o, h, d_out, width, WIDE) if PARTS == 2 else gx
    for done in range(chunks):
        chunk = chunks - 1 - done
        at = chunk * batch_heads + bh
        first, began = at * b, tl.cast(chunk * b, tl.int64)
        state = states + at * PARTS * size
        start = state
        if ANCHORED:
            start = tl.where(chunk == 0, anchor + bh * size, state)
        k = load_rows(keys + began * k_step, s, h, b, width, k_step)
        v = load_rows(values + began * v_step, s, o, b, d_out, v_step)
        w = load(start, o, h, d_out, width, WIDE)
        _, _, error = _errors(k, v, w, gain_o, s, o, b, once, d_out,
                                      NORM, CLIP, WIDE, FINE, FINE_PRECISION, LOSS, POWER, DELTA, SMOOTH)  # fmt: skip

        # through the state after the chunk: mix state - (write errors)^T keys
        dmix = tl.where(four == 0, tl.sum(gx * load(state, o, h, d_out, width, WIDE)), 0.0).to(WIDE)
        weight = -coefficient(write, first, s, b, 0, PARTS, WIDE)
        back = _product(k, tl.trans(gx), once, OPERAND, WIDE, PRECISION)
        tl.store(grad_write + (first + s) * PARTS, -tl.sum(back * error, axis=1), mask=s < b)
        derror = back * weight
        dk = _product(error * weight, gx, once, OPERAND, WIDE, PRECISION)
        if PARTS == 2:
            m = load(state + size, o, h, d_out, width, WIDE)
            dmix += tl.where(four == 1, tl.sum(gx * m), 0.0) + tl.where(four == 3, tl.sum(gm * m), 0.0)
            weight = -coefficient(write, first, s, b, 1, PARTS, WIDE)
            back = _product(k, tl.trans(gm), once, OPERAND, WIDE, PRECISION)
            tl.store(grad_write + (first + s) * PARTS + 1, -tl.sum(back * error, axis=1), mask=s < b)
            derror += back * weight
            dk += _product(error * weight, gm, once, OPERAND, WIDE, PRECISION)
            gm = factor(mix, at, 0, 1, PARTS, WIDE) * gx + factor(mix, at, 1, 1, PARTS, WIDE) * gm
        gx *= factor(mix, at, 0, 0, PARTS, WIDE)
        tl.store(grad_mix + (at * PARTS + four // 2) * PARTS + four % 2, dmix,
                 mask=(four // 2 < PARTS) & (four % 2 < PARTS))  # fmt: skip
        w = load(start, o, h, d_out, width, WIDE)
        v = load_rows(values + began * v_step, s, o, b, d_out, v_step)
        z, unclipped, _ = _errors(k, v, w, gain_o, s, o, b, once, d_out,
                                  NORM, CLIP, WIDE, FINE, FINE_PRECISION, LOSS, POWER, DELTA, SMOOTH)  # fmt: skip

        derror += load_tokens(grad_errors, first, s, o, b, d_out, WIDE)

        # through errors = scale unclipped, where scale = clip / |gradient| below one
        if CLIP is not None:
            none = tl.zeros((TOKENS,), WIDE)
            d_length, k_length, dscale = (
                row_length(unclipped, WIDE), row_length(k.to(WIDE), WIDE), tl.sum(derror * unclipped, axis=1)
            )  # fmt: skip
            norm = gradient_norm(none, none, d_length, k_length)
            scale = clip_scale(norm, CLIP)
            dnorm = tl.where(scale < 1, -4 * dscale * scale, 0.0)
            norm = tl.maximum(norm, CLIP)
            derror = derror * scale[:, None] + through_norm(unclipped, k_length / norm, dnorm)
            dk += through_norm(k.to(WIDE), d_length / norm, dnorm)

        # through the loss
        v = v.to(WIDE)
        delta = tl.full((TOKENS, 1), DELTA, WIDE)
        if NORM:
            dz, dresidual, dv, _, dgains = output_error_backward(
                derror, unclipped, z, k.to(WIDE), v, delta, gain_o, o < d_out, d_out, LOSS, POWER, SMOOTH
            )
            dgain += tl.sum(tl.where((s < b)[:, None], dgains, 0.0), axis=0)
            dk += dresidual
        else:
            dz, dv, _ = half_error_vjp(derror, z, v, delta, LOSS, POWER, SMOOTH)
        store_rows(grad_values + began * heads * d_out, s, o, b, d_out, heads * d_out, dv)
        dz = tl.where((s < b)[:, None], dz, 0.0)
        dk += _product(dz, load(start, o, h, d_out, width, WIDE), once, OPERAND, WIDE, PRECISION)
        dk += load_tokens(grad_key_parts, first, s, h, b, width, WIDE)
        store_rows(grad_keys + began * heads * width, s, h, b, width, heads * width, dk)
        dw = _product(tl.trans(dz), k, once, OPERAND, WIDE, PRECISION)
        if ANCHORED:
            store(grad_anchor + bh * size, o, h, tl.where(chunk == 0, d_out, 0), width, dw)
            dw = tl.where(chunk == 0, 0.0, dw)
        gx += dw + load(grad_states + at * PARTS * size, o, h, d_out, width, WIDE)
        if PARTS == 2:
            gm += load(grad_states + (at * PARTS + 1) * size, o, h, d_out, width, WIDE)
    tl.debug_barrier()
    store(grad_state, o, h, d_out, width, gx)
    if PARTS == 2:
        store(grad_state + size, o, h, d_out, width, gm)
    if NORM:
        tl.store(grad_gain + bh * d_out + o, dgain, mask=o < d_out)
