"""What the kernels of the memory coefficient: tiles of matrices, activations, LayerNorm, and the inner loss.

A chunk's tokens lie together, ``b`` of them: ``first`` is the number of the chunk's first token, counted over all
chunks and heads. What lies outside of a matrix is loaded as zero and not stored.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from ..network_torch import ACTIVATION_NUMBERS, EPS, LOSSES

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_BFLOAT16 = tl.constexpr(tl.bfloat16)
_EPS = tl.constexpr(EPS)


@triton.jit
def _rounded(x, LOST: tl.constexpr):
    """float32 without its last bits, to the nearest, to even where two are as near: bfloat16 loses 16, TF32 13.

    For the interpreter, which leaves TF32 out, cuts bfloat16 off, and multiplies its bits as if it were whole numbers.
    """
    bits = x.to(tl.int32, bitcast=True)
    half = (1 << (LOST - 1)) - 1
    return ((bits + half + ((bits >> LOST) & 1)) & -(1 << LOST)).to(tl.float32, bitcast=True)


@triton.jit
def as_bfloat16(x):
    """float32 with the digits of bfloat16."""
    return _rounded(x, 16) if _INTERPRETED else x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def load(x, row, column, rows, columns, WIDE: tl.constexpr):
    """A tile of a matrix of ``columns`` columns."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(WIDE)


@triton.jit
def store(x, row, column, rows, columns, values):
    if _INTERPRETED and x.dtype.element_ty == _BFLOAT16:
        values = _rounded(values, 16)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(x + row[:, None] * columns + column[None, :], values, mask=inside)


@triton.jit
def load_rows(x, t, column, stop, columns, step):
    """Some columns of the tokens before ``stop``, ``step`` numbers from each to the next."""
    inside = (t < stop)[:, None] & (column < columns)[None, :]
    return tl.load(x + t[:, None].to(tl.int64) * step + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(x, t, column, stop, columns, step, values):
    if _INTERPRETED and x.dtype.element_ty == _BFLOAT16:
        values = _rounded(values, 16)
    inside = (t < stop)[:, None] & (column < columns)[None, :]
    tl.store(x + t[:, None].to(tl.int64) * step + column[None, :], values, mask=inside)


@triton.jit
def replace(x, row, column, rows, columns, values):
    """``store`` of what was made of the tile that lies there, which every thread has loaded before."""
    tl.debug_barrier()
    store(x, row, column, rows, columns, values)


@triton.jit
def load_tokens(x, first, t, column, b, columns, WIDE: tl.constexpr):
    """Some columns of a chunk's tokens."""
    return load(x + first * columns, t, column, b, columns, WIDE)


@triton.jit
def store_tokens(x, first, t, column, b, columns, values):
    store(x + first * columns, t, column, b, columns, values)


@triton.jit
def replace_tokens(x, first, t, column, b, columns, values):
    replace(x + first * columns, t, column, b, columns, values)


@triton.jit
def load_half(x, half, first, t, h, b, width, GATED: tl.constexpr, WIDE: tl.constexpr):
    """``load_tokens`` of the first layer's outputs, where a gated network has those of both products side by side."""
    place = (first + t)[:, None] * ((1 + GATED) * width) + half * width + h[None, :]
    return tl.load(x + place, mask=(t < b)[:, None] & (h < width)[None, :], other=0.0).to(WIDE)


@triton.jit
def store_half(x, half, first, t, h, b, width, values, GATED: tl.constexpr):
    place = (first + t)[:, None] * ((1 + GATED) * width) + half * width + h[None, :]
    tl.store(x + place, values, mask=(t < b)[:, None] & (h < width)[None, :])


@triton.jit
def load_hidden(z, first, t, h, b, width, ACTIVATION: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr):
    """The last layer's inputs, from the first one's outputs ``z``."""
    x = activate(load_half(z, 0, first, t, h, b, width, GATED, WIDE), ACTIVATION)
    if GATED:
        x *= load_half(z, 1, first, t, h, b, width, GATED, WIDE)
    return x


@triton.jit
def dot(a, b, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Operands in their type, sums in the wide one."""
    if _INTERPRETED:
        if OPERAND == _BFLOAT16:
            a, b = _rounded(a, 16), _rounded(b, 16)
        elif PRECISION == "tf32":
            a, b = _rounded(a, 13), _rounded(b, 13)
        else:
            a, b = a.to(OPERAND), b.to(OPERAND)
        product = tl.dot(a, b, input_precision="ieee", out_dtype=WIDE)
    elif a.shape[0] < 64 and b.shape[1] >= 64:  # Hopper's matrix units take no fewer than 64 rows of the left operand
        a, b = tl.trans(b.to(OPERAND)), tl.trans(a.to(OPERAND))
        product = tl.trans(tl.dot(a, b, input_precision=PRECISION, out_dtype=WIDE))
    else:
        product = tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION, out_dtype=WIDE)
    return product


@triton.jit
def coefficient(matrix, first, t, b, part, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """What each token weighs for one part of the state (0 weights, 1 momentum), as a column."""
    return tl.load(matrix + (first + t) * PARTS + part, mask=t < b, other=0.0).to(WIDE)[:, None]


@triton.jit
def channel_weights(write, first, t, i, b, width, start, channels, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """What the inputs of each token weigh in the weights of their columns ``i``, where decays are by channel.

    The row of a token has all ``channels``, of which the layer's begin at ``start``, and with momentum its coefficient.
    """
    inside = (t < b)[:, None] & (i < width)[None, :]
    place = (first + t)[:, None] * (channels + PARTS - 1) + start + i[None, :]
    return tl.load(write + place, mask=inside, other=0.0).to(WIDE)


@triton.jit
def channel_mix(mix, at, i, width, part, other, start, channels, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """What the columns ``i`` of ``other`` of the state at a chunk's start weigh in ``part`` at its end.

    The row of a chunk has what the weights take of the weights, of the momentum, and what the momentum keeps.
    """
    row = mix + at * (PARTS * channels + PARTS - 1)
    place = other * channels + start + i
    if part == 1:
        place = PARTS * channels + i * 0
    return tl.load(row + place, mask=i < width, other=0.0).to(WIDE)


@triton.jit
def token_weight(write, first, t, b, part, channels, PARTS: tl.constexpr, BY_CHANNEL: tl.constexpr,
                 WIDE: tl.constexpr):  # fmt: skip
    """``coefficient``, or where decays are by channel that of the momentum, and ones for the weights."""
    if BY_CHANNEL:
        ones = tl.full(t.shape, 1.0, WIDE)
        if part == 1:
            ones = tl.load(write + (first + t) * (channels + 1) + channels, mask=t < b, other=0.0).to(WIDE)
        weight = ones[:, None]
    else:
        weight = coefficient(write, first, t, b, part, PARTS, WIDE)
    return weight


@triton.jit
def in_part(values, part, WIDE: tl.constexpr):
    """One number for each token, in the column of its part of the state."""
    return tl.where(tl.arange(0, 2) == part, 1.0, 0.0).to(WIDE)[None, :] * values[:, None]


@triton.jit
def load_gain(gain, bh, o, d_out, OUT: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr):
    """The gain of a head, or ones."""
    found = tl.full((OUT,), 1.0, WIDE)
    if NORM:
        found = tl.load(gain + bh * d_out + o, mask=o < d_out, other=0.0).to(WIDE)
    return found


# -- the norm of a gradient -----------------------------------------------------------------------------------------
#
# The gradient of a layer at a token is 2 d a^T, so that its norm is a product of lengths. The squares of numbers may
# overflow where a length does not: beside their sum there is that of the squares of the numbers scaled down.


@triton.jit
def _scale_down(WIDE: tl.constexpr):
    return tl.full((), 2.0**-80 if WIDE.primitive_bitwidth == 32 else 2.0**-600, WIDE)


@triton.jit
def square_sums(x, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """The sums of squares of numbers, and of numbers scaled down."""
    small = x * _scale_down(WIDE)
    return tl.sum(x * x, axis=AXIS), tl.sum(small * small, axis=AXIS)


@triton.jit
def length(squares, small_squares, WIDE: tl.constexpr):
    """Of vectors with these :func:`square_sums`."""
    return tl.where(squares < float("inf"), tl.sqrt(squares), tl.sqrt(small_squares) / _scale_down(WIDE))


@triton.jit
def row_length(x, WIDE: tl.constexpr):
    """Of each row of a tile."""
    squares, small_squares = square_sums(x, 1, WIDE)
    return length(squares, small_squares, WIDE)


@triton.jit
def gradient_norm(d_1, a_1, d_2, a_2):
    """The norm of the gradient of two layers, from the lengths of errors and inputs; zeros for no first layer."""
    x, y = d_1 * a_1, d_2 * a_2
    larger = tl.maximum(x, y)
    quotient = tl.minimum(x, y) / tl.where(larger > 0, larger, 1.0)
    return 2 * larger * tl.sqrt(1 + quotient * quotient)


@triton.jit
def clip_scale(norm, CLIP: tl.constexpr):
    """What brings the norm of a gradient down to ``CLIP``; NaN where the norm is not finite."""
    return CLIP / tl.maximum(norm, CLIP) + 0 * norm


@triton.jit
def through_norm(x, quotient, grad_norm):
    """The gradient of a vector through the norm; ``quotient``: of the length of the other factor and the norm.

    In this order, because the square of the quotient may underflow.
    """
    return x * quotient[:, None] * (quotient * grad_norm)[:, None]


# -- activations and LayerNorm --------------------------------------------------------------------------------------

_RELU, _SILU, _GELU = (tl.constexpr(ACTIVATION_NUMBERS[name]) for name in ("relu", "silu", "gelu"))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == _RELU:
        z = tl.where(z < 0, 0.0, z)  # NaN stays, which tl.maximum would lose
    elif ACTIVATION == _SILU:
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == _GELU:
        z = z * 0.5 * (1 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """The first derivative."""
    if ACTIVATION == _RELU:
        first = tl.where(z > 0, 1.0, 0.0).to(z.dtype)
    elif ACTIVATION == _SILU:
        s = 1 / (1 + tl.exp(-z))
        first = s + z * s * (1 - s)
    elif ACTIVATION == _GELU:
        first = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        first = tl.full(z.shape, 1.0, z.dtype)
    return first


@triton.jit
def curvature(z, ACTIVATION: tl.constexpr):
    """The second derivative."""
    if ACTIVATION == _SILU:
        s = 1 / (1 + tl.exp(-z))
        second = s * (1 - s) * (2 + z * (1 - 2 * s))
    elif ACTIVATION == _GELU:
        second = tl.exp(-0.5 * z * z) * 0.3989422804014327 * (2 - z * z)
    else:
        second = tl.zeros(z.shape, z.dtype)
    return second


@triton.jit
def layer_norm(z, inside, width):
    """``(z - mean) / sigma`` over the columns that are inside, and ``1 / sigma``."""
    mean = tl.sum(z, axis=1)[:, None] / width
    centered = tl.where(inside[None, :], z - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centered * centered, axis=1)[:, None] / width + _EPS)
    return centered * inverse, inverse


@triton.jit
def layer_norm_vjp(g, n, inverse, inside, width):
    """The vector-Jacobian product of ``layer_norm``."""
    g_mean = tl.sum(g, axis=1)[:, None] / width
    along = tl.sum(g * n, axis=1)[:, None] / width
    return tl.where(inside[None, :], (g - g_mean - n * along) * inverse, 0.0)


# -- the inner loss ------------------------------------------------------------------------------------


_L2, _L2_HALF, _DOT, _LP, _LP_SMOOTH, _HUBER, _HUBER_ELEMENTWISE = map(tl.constexpr, range(len(LOSSES)))


@triton.jit
def _sign(r):
    """NaN stays NaN."""
    return tl.where(r > 0, 1.0, tl.where(r < 0, -1.0, r))


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    return _sign(x) * (1 - e) / (1 + e)


@triton.jit
def _magnitude(r, POWER: tl.constexpr):
    """``|r|^POWER``; 0 at 0 unless the power is 0."""
    size = tl.abs(r)
    if POWER == 0:
        size = tl.full(r.shape, 1.0, r.dtype)
    elif POWER == 2:
        size = r * r
    elif POWER != 1:
        size = tl.where(size == 0, 0.0, tl.exp(tl.log(tl.where(size == 0, 1.0, size)) * POWER))
    return size


@triton.jit
def _within(r, delta):
    """Whether the norm of each row is at most ``delta``, as columns."""
    return tl.sqrt(tl.sum(r * r, axis=1))[:, None] <= delta


@triton.jit
def load_deltas(deltas, first, t, b, DELTA: tl.constexpr, DELTAS: tl.constexpr, WIDE: tl.constexpr):
    """The thresholds of some tokens as a column: each its own, or the objective's."""
    found = tl.full(t.shape, DELTA, WIDE)
    if DELTAS:
        found = tl.load(deltas + first + t, mask=t < b, other=0.0).to(WIDE)
    return found[:, None]


@triton.jit
def half_error(p, v, delta, LOSS: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr):
    """``half_error`` of ``network_torch.py``: predictions and values are rows, ``delta`` is a column."""
    r = p - v
    if LOSS == _L2_HALF:
        r = r * 0.5
    elif LOSS == _DOT:
        r = v * -0.5
    elif LOSS == _LP:
        r = _sign(r) * _magnitude(r, POWER - 1) * (POWER / 2)
    elif LOSS == _LP_SMOOTH:
        r = _tanh(r * SMOOTH) * _magnitude(r, POWER - 1) * (POWER / 2)
    elif LOSS == _HUBER:
        r = tl.where(_within(r, delta), r, _sign(r) * (delta / 2))
    elif LOSS == _HUBER_ELEMENTWISE:
        r = tl.where(tl.abs(r) > delta, _sign(r) * delta, r) * 0.5
    return r


@triton.jit
def _of_delta(g, r, rise):
    """The gradient of the threshold of each row, where the error does not rise."""
    return tl.sum(tl.where(rise > 0, 0.0, g * _sign(r)), axis=1) * 0.5


@triton.jit
def half_error_vjp(g, p, v, delta, LOSS: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr):
    """From the gradient ``g`` of ``half_error(p, v, delta)`` to those of ``p``, ``v`` and ``delta``, one a row."""
    r, grad_v = p - v, -g
    grad_delta = tl.zeros((p.shape[0],), p.dtype)
    if LOSS == _L2_HALF:
        g = g * 0.5
        grad_v = -g
    elif LOSS == _DOT:
        grad_v = g * -0.5
        g = tl.zeros(g.shape, g.dtype)
    elif LOSS != _L2:
        if LOSS == _LP:
            rise = _magnitude(r, POWER - 2) * (POWER * (POWER - 1) / 2)
        elif LOSS == _LP_SMOOTH:
            sign = _tanh(r * SMOOTH)
            rise = (1 - sign * sign) * SMOOTH * _magnitude(r, POWER - 1)
            if POWER != 1:
                rise += tl.abs(sign) * _magnitude(r, POWER - 2) * (POWER - 1)
            rise *= POWER / 2
        elif LOSS == _HUBER:
            rise = tl.where(_within(r, delta), 1.0, 0.0)
            grad_delta = _of_delta(g, r, rise)
        else:
            rise = tl.where(tl.abs(r) <= delta, 0.5, 0.0)
            grad_delta = _of_delta(g, r, rise)
        g = g * rise
        grad_v = -g
    return g, grad_v, grad_delta


@triton.jit
def output_error(z, residual, v, delta, gain_o, inside, d_out, NORM: tl.constexpr,
                 LOSS: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr):  # fmt: skip
    """The (half) error at the last layer's output ``z`` ``[tokens, d_out]``; ``residual`` are the keys, for a norm."""
    if NORM:
        n, inverse = layer_norm(z, inside, d_out)
        error = half_error(residual + n * gain_o[None, :], v, delta, LOSS, POWER, SMOOTH)
        error = layer_norm_vjp(error * gain_o[None, :], n, inverse, inside, d_out)
    else:
        error = half_error(z, v, delta, LOSS, POWER, SMOOTH)
    return error


@triton.jit
def output_error_backward(g, error, z, residual, v, delta, gain_o, inside, d_out,
                          LOSS: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr):  # fmt: skip
    """From the gradient ``g`` of ``error = output_error(z, ...)`` with a norm: to ``z``, residual, v, delta and gain.

    The gain's is not summed over tokens.
    """
    n, inverse = layer_norm(z, inside, d_out)
    predicted = residual + n * gain_o[None, :]
    e = half_error(predicted, v, delta, LOSS, POWER, SMOOTH)
    u = e * gain_o[None, :]
    du = layer_norm_vjp(g, n, inverse, inside, d_out)
    dpredicted, dv, ddelta = half_error_vjp(du * gain_o[None, :], predicted, v, delta, LOSS, POWER, SMOOTH)
    # the error depends on z through the inner n, through the n of its own projection, and through 1 / sigma
    p = g * inverse
    dn = dpredicted * gain_o[None, :]
    dn -= p * (tl.sum(u * n, axis=1)[:, None] / d_out)
    dn -= u * (tl.sum(p * n, axis=1)[:, None] / d_out)
    dz = layer_norm_vjp(dn, n, inverse, inside, d_out) - n * (tl.sum(p * error, axis=1)[:, None] / d_out)
    return dz, dpredicted, dv, ddelta, du * e + dpredicted * n
