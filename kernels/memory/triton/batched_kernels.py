"""What a memory in products of the whole batch (``batched.py``) computes between its products, as Triton kernels.

Each is separate for every token. The names are those of ``chunk_torch.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_runtime import VARYING
from .tiles import (
    activate,
    clip_scale,
    curvature,
    gradient_norm,
    half_error_vjp,
    length,
    load_deltas,
    load_gain,
    load_half,
    load_hidden,
    load_tokens,
    output_error,
    output_error_backward,
    replace_tokens,
    slope,
    square_sums,
    store_half,
    store_tokens,
    through_norm,
)

# -- hidden layers -----------------------------------------------------------------------------------------------------


@triton.jit
def _hidden_place(tokens, width, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens and hidden units of a program."""
    across = tl.cdiv(width, BLOCK)
    t = (tl.program_id(0) // across).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    return t, (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=VARYING)
def hidden_kernel(
    z, to, tokens, width,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The inputs of a layer from the outputs ``z`` of the one below."""
    t, h = _hidden_place(tokens, width, TOKENS, BLOCK)
    store_tokens(to, 0, t, h, tokens, width, load_hidden(z, 0, t, h, tokens, width, ACTIVATION, GATED, WIDE))


@triton.jit(do_not_specialize=VARYING)
def hidden_backward_kernel(
    g, z, through, to, tokens, width,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of ``z`` from that of ``hidden_kernel``'s result; ``through``: what is added to it."""
    t, h = _hidden_place(tokens, width, TOKENS, BLOCK)
    preact = load_half(z, 0, 0, t, h, tokens, width, GATED, WIDE)
    upstream = load_tokens(g, 0, t, h, tokens, width, WIDE)
    for half in tl.static_range(1 + GATED):
        d = upstream * activate(preact, ACTIVATION) if half else upstream * slope(preact, ACTIVATION)
        if GATED and half == 0:
            d *= load_half(z, 1, 0, t, h, tokens, width, GATED, WIDE)
        if through is not None:
            d += load_half(through, half, 0, t, h, tokens, width, GATED, WIDE)
        store_half(to, half, 0, t, h, tokens, width, d, GATED)


@triton.jit(do_not_specialize=VARYING)
def hidden_second_kernel(
    g, z, upstream, through, grad_upstream, tokens, width,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Through the errors at ``z``, whose gradient is ``g``: the gradients of ``z`` (``through``) and ``upstream``."""
    t, h = _hidden_place(tokens, width, TOKENS, BLOCK)
    preact = load_half(z, 0, 0, t, h, tokens, width, GATED, WIDE)
    first = load_half(g, 0, 0, t, h, tokens, width, GATED, WIDE)
    of_upstream = first * slope(preact, ACTIVATION)
    if through is not None:
        u = load_tokens(upstream, 0, t, h, tokens, width, WIDE)
        of_z = first * (u * curvature(preact, ACTIVATION))
        if GATED:
            across = u * slope(preact, ACTIVATION)
            of_gate = load_half(g, 1, 0, t, h, tokens, width, GATED, WIDE)
            gate = load_half(z, 1, 0, t, h, tokens, width, GATED, WIDE)
            of_z = of_z * gate + of_gate * across
            of_upstream = of_upstream * gate + of_gate * activate(preact, ACTIVATION)
            store_half(through, 1, 0, t, h, tokens, width, first * across, GATED)
        store_half(through, 0, 0, t, h, tokens, width, of_z, GATED)
    store_tokens(grad_upstream, 0, t, h, tokens, width, of_upstream)


@triton.jit(do_not_specialize=VARYING)
def inner_kernel(
    x, parts, to, tokens, width,
    PARTS: tl.constexpr, SIGN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds to ``to`` ``[tokens, PARTS]`` the inner products of ``x`` with ``parts`` ``[tokens, PARTS, width]``."""
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    for part in tl.static_range(PARTS):
        found = tl.zeros((TOKENS,), WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            place = (t * PARTS + part)[:, None] * width + h[None, :]
            y = tl.load(parts + place, mask=(t < tokens)[:, None] & (h < width)[None, :], other=0.0).to(WIDE)
            found += tl.sum(load_tokens(x, 0, t, h, tokens, width, WIDE) * y, axis=1)
        before = tl.load(to + t * PARTS + part, mask=t < tokens, other=0.0).to(WIDE)
        tl.debug_barrier()  # other threads may not have loaded yet
        tl.store(to + t * PARTS + part, before + SIGN * found, mask=t < tokens)


# -- the loss ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def error_kernel(
    z, keys, values, deltas, gain, to, b, d_out,
    NORM: tl.constexpr, TOKENS: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, DELTAS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Half errors at the last layer's outputs."""
    row = tl.program_id(0).to(tl.int64)
    t, o, first = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, OUT), row * b
    z_t = load_tokens(z, first, t, o, b, d_out, WIDE)
    residual = z_t
    if NORM:
        residual = load_tokens(keys, first, t, o, b, d_out, WIDE)
    v = load_tokens(values, first, t, o, b, d_out, WIDE)
    delta = load_deltas(deltas, first, t, b, DELTA, DELTAS, WIDE)
    gain_o = load_gain(gain, row, o, d_out, OUT, NORM, WIDE)
    error = output_error(z_t, residual, v, delta, gain_o, o < d_out, d_out, NORM, LOSS, POWER, SMOOTH)
    store_tokens(to, first, t, o, b, d_out, error)


@triton.jit(do_not_specialize=VARYING)
def error_backward_kernel(
    g, error, z, keys, values, deltas, gain, grad_z, grad_keys, grad_values, grad_deltas, grad_gain, b, d_out,
    NORM: tl.constexpr, TOKENS: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, DELTAS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """The gradients of ``z``, values and deltas from that of the errors; adds to those of keys and gain.

    ``grad_gain``: ``[rows, programs of a row, d_out]``.
    """
    row = tl.program_id(0).to(tl.int64)
    t, o, first = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, OUT), row * b
    g_t = load_tokens(g, first, t, o, b, d_out, WIDE)
    z_t = load_tokens(z, first, t, o, b, d_out, WIDE)
    v = load_tokens(values, first, t, o, b, d_out, WIDE)
    delta = load_deltas(deltas, first, t, b, DELTA, DELTAS, WIDE)
    if NORM:
        gain_o = load_gain(gain, row, o, d_out, OUT, NORM, WIDE)
        residual = load_tokens(keys, first, t, o, b, d_out, WIDE)
        unclipped = load_tokens(error, first, t, o, b, d_out, WIDE)
        dz, dresidual, dv, ddelta, dgains = output_error_backward(
            g_t, unclipped, z_t, residual, v, delta, gain_o, o < d_out, d_out, LOSS, POWER, SMOOTH
        )
        # a residual network is as wide at its end as at its beginning
        dresidual += load_tokens(grad_keys, first, t, o, b, d_out, WIDE)
        replace_tokens(grad_keys, first, t, o, b, d_out, dresidual)
        place = grad_gain + (row * tl.num_programs(1) + tl.program_id(1)) * d_out + o
        dgain = tl.sum(tl.where((t < b)[:, None], dgains, 0.0), axis=0)
        dgain += tl.load(place, mask=o < d_out, other=0.0).to(WIDE)
        tl.debug_barrier()
        tl.store(place, dgain, mask=o < d_out)
    else:
        dz, dv, ddelta = half_error_vjp(g_t, z_t, v, delta, LOSS, POWER, SMOOTH)
    if DELTAS:
        tl.store(grad_deltas + first + t, ddelta, mask=t < b)
    store_tokens(grad_values, first, t, o, b, d_out, dv)
    store_tokens(grad_z, first, t, o, b, d_out, dz)


# -- clipping, of one or two layers; one layer takes the second's place ------------------------------------------------


@triton.jit
def _length(x, t, tokens, width, TOKENS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Of the vector of each token."""
    squares, small_squares = tl.zeros((TOKENS,), WIDE), tl.zeros((TOKENS,), WIDE)
    for h0 in range(0, width, BLOCK):
        tile = load_tokens(x, 0, t, h0 + tl.arange(0, BLOCK), tokens, width, WIDE)
        more, small_more = square_sums(tile, 1, WIDE)
        squares += more
        small_squares += small_more
    return length(squares, small_squares, WIDE)


@triton.jit
def _lengths(d_1, a_1, d_2, a_2, t, tokens, up, d_in, d_out, width,
             LAYERS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Those of errors and inputs of both layers, and the norm of the gradient."""
    d_1_length, a_1_length = tl.zeros((TOKENS,), WIDE), tl.zeros((TOKENS,), WIDE)
    if LAYERS == 2:
        d_1_length = _length(d_1, t, tokens, up, TOKENS, BLOCK, WIDE)
        a_1_length = _length(a_1, t, tokens, d_in, TOKENS, BLOCK, WIDE)
    d_2_length = _length(d_2, t, tokens, d_out, TOKENS, BLOCK, WIDE)
    a_2_length = _length(a_2, t, tokens, width, TOKENS, BLOCK, WIDE)
    norm = gradient_norm(d_1_length, a_1_length, d_2_length, a_2_length)
    return d_1_length, a_1_length, d_2_length, a_2_length, norm


@triton.jit
def _scaled(x, scale, to, t, tokens, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        store_tokens(to, 0, t, h, tokens, width, load_tokens(x, 0, t, h, tokens, width, WIDE) * scale[:, None])


@triton.jit(do_not_specialize=VARYING)
def clip_kernel(
    d_1, a_1, d_2, a_2, error_1, error_2, tokens, up, d_in, d_out, width,
    LAYERS: tl.constexpr, CLIP: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The errors, with gradients of a norm of at most ``CLIP``. ``d_l``: unclipped errors, ``a_l``: inputs."""
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    _, _, _, _, norm = _lengths(
        d_1, a_1, d_2, a_2, t, tokens, up, d_in, d_out, width, LAYERS, TOKENS, BLOCK, WIDE
    )  # fmt: skip
    scale = clip_scale(norm, CLIP)
    if LAYERS == 2:
        _scaled(d_1, scale, error_1, t, tokens, up, BLOCK, WIDE)
    _scaled(d_2, scale, error_2, t, tokens, d_out, BLOCK, WIDE)


@triton.jit
def _along(g, d, t, tokens, width, TOKENS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The inner product of two vectors of each token."""
    found = tl.zeros((TOKENS,), WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        x, y = load_tokens(g, 0, t, h, tokens, width, WIDE), load_tokens(d, 0, t, h, tokens, width, WIDE)
        found += tl.sum(x * y, axis=1)
    return found


@triton.jit
def _through_norm(g, x, scale, quotient, grad_norm, t, tokens, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """``scale g`` and the gradient of ``x`` through the norm, in the place of ``g``."""
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        value = load_tokens(g, 0, t, h, tokens, width, WIDE) * scale[:, None]
        value += through_norm(load_tokens(x, 0, t, h, tokens, width, WIDE), quotient, grad_norm)
        replace_tokens(g, 0, t, h, tokens, width, value)


@triton.jit(do_not_specialize=VARYING)
def clip_backward_kernel(
    d_1, a_1, d_2, a_2, grad_d_1, grad_a_1, grad_d_2, grad_a_2, tokens, up, d_in, d_out, width,
    LAYERS: tl.constexpr, CLIP: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """From the gradients of errors to those of unclipped errors, in their place; adds to those of inputs."""
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d_1_length, a_1_length, d_2_length, a_2_length, norm = _lengths(
        d_1, a_1, d_2, a_2, t, tokens, up, d_in, d_out, width, LAYERS, TOKENS, BLOCK, WIDE
    )
    scale = clip_scale(norm, CLIP)
    dscale = _along(grad_d_2, d_2, t, tokens, d_out, TOKENS, BLOCK, WIDE)
    if LAYERS == 2:
        dscale += _along(grad_d_1, d_1, t, tokens, up, TOKENS, BLOCK, WIDE)
    # d scale / d norm = -scale / norm, and norm^2 is 4 sum |d|^2 |a|^2
    dnorm = tl.where(scale < 1, -4 * dscale * scale, 0.0)
    norm, one = tl.maximum(norm, CLIP), tl.full((TOKENS,), 1.0, WIDE)
    tl.debug_barrier()
    if LAYERS == 2:
        _through_norm(grad_d_1, d_1, scale, a_1_length / norm, dnorm, t, tokens, up, BLOCK, WIDE)
        _through_norm(grad_a_1, a_1, one, d_1_length / norm, dnorm, t, tokens, d_in, BLOCK, WIDE)
    _through_norm(grad_d_2, d_2, scale, a_2_length / norm, dnorm, t, tokens, d_out, BLOCK, WIDE)
    _through_norm(grad_a_2, a_2, one, d_2_length / norm, dnorm, t, tokens, width, BLOCK, WIDE)
