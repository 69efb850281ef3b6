"""The inner loss ``|M(k) - v|^2``: half its gradient at the last layer's output, and the derivative of that."""

from __future__ import annotations

import triton
import triton.language as tl

from .network_kernel import normalise, pull


@triton.jit
def output_error(z, residual, v, of_gain, inside, d_out, eps, NORM: tl.constexpr):
    """What the last layer's output ``z`` is off by, ``[tokens, d_out]``; ``residual`` (keys) is used with a norm."""
    if NORM:
        n, inverse = normalise(z, inside, d_out, eps)
        error = pull((residual + n * of_gain[None, :] - v) * of_gain[None, :], n, inverse, inside, d_out)
    else:
        error = z - v
    return error


@triton.jit
def output_error_backward(g, raw, z, residual, v, of_gain, inside, d_out, eps):
    """From the gradient ``g`` of ``raw = output_error(z, ...)``, with a norm: to ``z``, to the residual, and the gain.

    The values are due the opposite of what the residual is. The gain's is of each token still.
    """
    n, inverse = normalise(z, inside, d_out, eps)
    miss = residual + n * of_gain[None, :] - v
    pushed = miss * of_gain[None, :]
    to_pushed = pull(g, n, inverse, inside, d_out)
    to_miss = to_pushed * of_gain[None, :]
    # the error depends on z through the inner n, through the n of its own projection, and through 1 / sigma
    falling = g * inverse
    to_n = to_miss * of_gain[None, :]
    to_n -= falling * (tl.sum(pushed * n, axis=1)[:, None] / d_out)
    to_n -= pushed * (tl.sum(falling * n, axis=1)[:, None] / d_out)
    to_z = pull(to_n, n, inverse, inside, d_out) - n * (tl.sum(falling * raw, axis=1)[:, None] / d_out)
    return to_z, to_miss, to_pushed * miss + to_miss * n
