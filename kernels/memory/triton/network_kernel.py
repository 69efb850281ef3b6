"""The parts of a memory network that are no products: activations and normalisation, with their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl

from ..network_torch import ACTIVATION_NUMBERS

_RELU, _SILU, _GELU = (tl.constexpr(ACTIVATION_NUMBERS[name]) for name in ("relu", "silu", "gelu"))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == _RELU:
        z = tl.maximum(z, 0.0)
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
def normalise(z, inside, width, eps):
    """``(z - mean) / sigma`` over the columns that are inside, and ``1 / sigma``."""
    mean = tl.sum(z, axis=1)[:, None] / width
    centred = tl.where(inside[None, :], z - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=1)[:, None] / width + eps)
    return centred * inverse, inverse


@triton.jit
def pull(g, n, inverse, inside, width):
    """The vector-Jacobian product of ``normalise``."""
    g_mean = tl.sum(g, axis=1)[:, None] / width
    along = tl.sum(g * n, axis=1)[:, None] / width
    return tl.where(inside[None, :], (g - g_mean - n * along) * inverse, 0.0)
