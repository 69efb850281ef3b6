"""The gates of a chunk as matrices: products of gates over all intervals of its tokens.

With ``f`` the per-token factors, ``P[t, r] = prod_{r < j <= t} f_j`` for ``r <= t`` is lower triangular with ones on
its diagonal. Products are computed as products, without logarithms or quotients, so that a factor of exactly 0 or 1 is
exact, and so is its gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..scan import linear_scan


class _IntervalProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factors: Tensor) -> tuple[Tensor, Tensor]:
        # column r accumulates f_{r+1}, f_{r+2}, ... after ones up to the diagonal
        b = factors.shape[-1]
        ones = torch.ones(b, b, dtype=factors.dtype, device=factors.device)
        runs = torch.addcmul(ones.tril(), factors.unsqueeze(-2), ones.triu(1))
        products = runs.cumprod(-1).mul_(ones.triu()).mT
        start = factors.cumprod(-1)
        ctx.save_for_backward(products, start)
        return products, start

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_start: Tensor) -> Tensor:
        # dP[t, r] / df_j = P[t, j] P[j-1, r] for r < j <= t: the product with the factor itself kept out
        products, start = ctx.saved_tensors
        before = torch.cat([torch.ones_like(start[..., :1]), start[..., :-1]], dim=-1)
        passed = grad_start.unsqueeze(-1) * before.unsqueeze(-2)
        passed[..., 1:] += (grad @ products.mT)[..., :-1]
        return (products * passed).sum(-2)


def interval_products(factors: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., b]`` -> ``P`` ``[..., b, b]``, and ``[..., b]``: the product of everything up to each token."""
    return _IntervalProducts.apply(factors)


class ChunkDecay(NamedTuple):
    """Coefficients for a chunk of ``b`` tokens; ``read`` and ``carry`` are empty where reads are at the anchor.

    The state has ``s`` parts: 2 (weights, momentum), or 1 without momentum.
    """

    read: Tensor
    """``[..., b, b]``: of the error times input of token ``s`` in the weights that are read at token ``t``."""
    carry: Tensor
    """``[..., b, s]``: of the state at the chunk's start in the weights that are read at token ``t``."""
    write: Tensor
    """``[..., b, s]``: of the error times input of each token in the weights and momentum at the chunk's end."""
    mix: Tensor
    """``[..., s, s]``: of the state at the chunk's start in the state at its end."""


def chunk_decay(
    theta: Tensor, eta: Tensor | None, alpha: Tensor | None, valid: Tensor | None, read_after: bool
) -> ChunkDecay:
    """Gates ``[..., b]`` -> matrices; ``eta=None``: no momentum, ``alpha=None``: no forgetting. Differentiable.

    ``valid`` ``[..., b]``, or ``None`` for all: 0 where a slot has no token. The gates of such a slot must be theta 0,
    eta 1 and alpha 0. ``valid`` keeps the momentum from being added to the weights at an empty slot; no gate value
    expresses this.

    The inner loss is a plain sum of squares; its factor 2 is folded in here, next to the step size.
    """
    step = (2 * theta).unsqueeze(-2)
    # names as in closed_form.py
    if alpha is None:
        ones = torch.ones(*theta.shape[-1:], *theta.shape[-1:], dtype=theta.dtype, device=theta.device).tril_()
        D, A = ones.expand(*theta.shape, theta.shape[-1]), torch.ones_like(theta)
    else:
        D, A = interval_products(1 - alpha)
    if eta is None:
        C, carry = D, A.unsqueeze(-1)
        write, mix = (C[..., -1:, :] * step).mT, carry[..., -1:, :]
    else:
        H, E = interval_products(eta)
        H_end, E_end = H[..., -1:, :], E[..., -1:, None]
        # a product that is not finite belongs to its token and those after it: times the zeros of `added` it is NaN
        lost = ~(H.sum(-1) + E).isfinite()
        confine = not lost.is_cpu or bool(lost.any())
        if confine:
            H, E = H.masked_fill(lost.unsqueeze(-1), 0.0), E.masked_fill(lost, 0.0)
        added = D if valid is None else D * valid.unsqueeze(-2)
        C, m = added @ H, added @ E.unsqueeze(-1)
        if confine:
            C, m = C.masked_fill(lost.unsqueeze(-1), math.nan), m.masked_fill(lost.unsqueeze(-1), math.nan)
        carry = torch.cat([A.unsqueeze(-1), m], dim=-1)
        write = torch.cat([C[..., -1:, :] * step, H_end * step], dim=-2).mT
        mix = torch.cat([carry[..., -1:, :], torch.cat([torch.zeros_like(E_end), E_end], dim=-1)], dim=-2)
    if not read_after:
        # token t reads the weights after token t - 1: rows move down by one, and the first token reads the start
        C = torch.cat([torch.zeros_like(C[..., :1, :]), C[..., :-1, :]], dim=-2)
        first = torch.zeros_like(carry[..., :1, :])
        first[..., 0] = 1
        carry = torch.cat([first, carry[..., :-1, :]], dim=-2)
    return ChunkDecay(C * step, carry, write.contiguous(), mix)


def windowed(decay: ChunkDecay, gamma: Tensor, last_read: int) -> ChunkDecay:
    """``decay`` of steps along the gradients of the tokens in a window, and not along the token's own; differentiable.

    ``gamma`` ``[..., past + b]``: the weight of each write in every window that it is in. ``read`` and ``write`` become
    those of the writes. ``last_read``: the last token whose step is read at the first, 0 or -1.
    """
    (b, _), writes = decay.write.shape[-2:], gamma.shape[-1]
    band = gamma.new_ones(b, writes).triu_().tril_(writes - b)
    read, write = decay.read, (band.mT @ decay.write) * gamma.unsqueeze(-1)
    if read.numel():  # zero for later tokens, also where a step is not finite
        read = (read.tril(last_read) @ band) * gamma.unsqueeze(-2)
    return decay._replace(read=read, write=write)


def end_decay(
    theta: Tensor, eta: Tensor | None, alpha: Tensor | None, valid: Tensor | None, read_after: bool
) -> ChunkDecay:
    """``write`` and ``mix`` of :func:`chunk_decay`, without a matrix for each pair of tokens, for reads at the anchor.

    The coefficients at a chunk's end are recurrences from its last token to its first.
    """

    def from_the_end(gate: Tensor, inputs: Tensor) -> Tensor:
        """``x_t = inputs_t + gate_{t+1} x_{t+1}``."""
        gates = torch.cat([torch.zeros_like(gate[..., :1]), gate[..., 1:].flip(-1)], -1)
        flat = (x.reshape(-1, x.shape[-1]) for x in (gates, inputs.flip(-1)))
        return linear_scan(*flat).view(inputs.shape).flip(-1)

    step, last = 2 * theta, torch.zeros_like(theta)
    last[..., -1] = 1
    kept = torch.ones_like(theta) if alpha is None else from_the_end(1 - alpha, last)
    start = kept[..., 0] if alpha is None else kept[..., 0] * (1 - alpha[..., 0])
    empty = theta.new_empty(0)
    if eta is None:
        return ChunkDecay(empty, empty, (kept * step).unsqueeze(-1), start[..., None, None])
    H, C = from_the_end(eta, last), from_the_end(eta, kept if valid is None else kept * valid)
    m, E = eta[..., 0] * C[..., 0], eta[..., 0] * H[..., 0]
    mix = torch.stack([torch.stack([start, m], -1), torch.stack([torch.zeros_like(E), E], -1)], -2)
    return ChunkDecay(empty, empty, torch.stack([C * step, H * step], -1), mix)
