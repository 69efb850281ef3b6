"""How much of every past write is left: products of gates over all intervals of a chunk.

With ``f`` the per-token factors, ``P[t, r] = prod_{r < j <= t} f_j`` for ``r <= t`` is lower triangular with ones on
its diagonal. Products are taken as products: no logarithm and no quotient, so a factor of exactly 0 or 1 is exact,
and so is the gradient at it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


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
        # dP[t, r] / df_j = P[t, j] P[j-1, r] for r < j <= t: the product with the factor itself left out
        products, start = ctx.saved_tensors
        before = torch.cat([torch.ones_like(start[..., :1]), start[..., :-1]], dim=-1)
        passed = grad_start.unsqueeze(-1) * before.unsqueeze(-2)
        passed[..., 1:] += (grad @ products.mT)[..., :-1]
        return (products * passed).sum(-2)


def interval_products(factors: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., b]`` -> ``P`` ``[..., b, b]``, and ``[..., b]``: the product of everything up to each token."""
    return _IntervalProducts.apply(factors)


class ChunkDecay(NamedTuple):
    """The gates of a chunk of ``b`` tokens as the matrices its products need.

    ``s`` counts what the state stacks: 2 (weights, momentum), or 1 where there is no momentum.
    """

    read: Tensor
    """``[..., b, b]``: what the (half) gradient of token ``s`` weighs in the weights that token ``t`` reads."""
    carry: Tensor
    """``[..., b, s]``: what the state at the start weighs in the weights that token ``t`` reads."""
    write: Tensor
    """``[..., b, s]``: what the (half) gradient of each token weighs in the weights and momentum at the end."""
    mix: Tensor
    """``[..., s, s]``: the state at the end, from the state at the start."""


def chunk_decay(
    theta: Tensor, eta: Tensor | None, alpha: Tensor | None, real: Tensor | None, read_after: bool
) -> ChunkDecay:
    """Gates ``[..., b]`` -> matrices; ``eta=None``: no momentum, ``alpha=None``: no forgetting. Differentiable.

    ``real`` ``[..., b]``, or ``None`` for all: 0 where a slot holds no token. Its gates must be the identity (theta
    0, eta 1, alpha 0); what no gate can say is that such a slot does not add the momentum to the weights again.

    The inner loss is a plain sum of squares; its factor 2 is folded in here, next to the step size.
    """
    step = (2 * theta).unsqueeze(-2)
    if alpha is None:
        ones = torch.ones(*theta.shape[-1:], *theta.shape[-1:], dtype=theta.dtype, device=theta.device).tril_()
        retain, left = ones.expand(*theta.shape, theta.shape[-1]), torch.ones_like(theta)
    else:
        retain, left = interval_products(1 - alpha)
    left = left.unsqueeze(-1)
    if eta is None:
        weigh, carry, mix = retain, left, left[..., -1:, :]
        write = (weigh[..., -1:, :] * step).mT
    else:
        lasting, lasted = interval_products(eta)
        added = retain if real is None else retain * real.unsqueeze(-2)
        weigh = added @ lasting
        carry = torch.cat([left, added @ lasted.unsqueeze(-1)], dim=-1)
        write = torch.cat([weigh[..., -1:, :] * step, lasting[..., -1:, :] * step], dim=-2).mT
        below = lasted[..., -1:, None]
        mix = torch.cat([carry[..., -1:, :], torch.cat([torch.zeros_like(below), below], dim=-1)], dim=-2)
    if not read_after:
        # token t reads what its predecessor left: every row moves down by one, the first reads the start
        weigh = torch.cat([torch.zeros_like(weigh[..., :1, :]), weigh[..., :-1, :]], dim=-2)
        first = torch.zeros_like(carry[..., :1, :])
        first[..., 0] = 1
        carry = torch.cat([first, carry[..., :-1, :]], dim=-2)
    return ChunkDecay(weigh * step, carry, write.contiguous(), mix)
