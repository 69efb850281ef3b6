"""What the gates of a learner's chunk are as matrices: how much of each gradient is in the weights after each token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rule import Rule
from .state import Writes


def products(x: Tensor) -> Tensor:
    """``[..., time] -> [..., time, 1 + time]``: entry ``t, r`` is the product of ``x`` after ``r`` up to ``t``.

    Column 0 begins at the start; column ``1 + r`` after token ``r``. Zero where ``r > t``. Exact at factors of zero.
    """
    time = x.shape[-1]
    row = torch.arange(time, device=x.device).unsqueeze(-1)
    column = torch.arange(time + 1, device=x.device)
    factors = torch.where(row >= column, x.unsqueeze(-1), 1.0)
    return torch.where(row + 1 >= column, torch.cumprod(factors, dim=-2), 0.0)


class Coefficients(NamedTuple):
    """What the weights after each token are made of: ``U_t = A_t U_0 + sum_j m_jt S_j - sum_s C_ts G_s``.

    With decays by channel, each has ``[batch, heads, channels, ...]``.
    """

    kept: Tensor
    """``A``: ``[batch, heads, time]``."""
    carried: list[Tensor]
    """``m_j`` for each momentum, the first first: ``[batch, heads, time]``."""
    written: Tensor
    """``C``: ``[batch, heads, time, writes]``."""
    momentum: list[tuple[list[Tensor], Tensor]]
    """For each momentum after the last token: how much of each momentum is in it, ``[batch, heads]``, and of each
    gradient ``[batch, heads, writes]``."""


def coefficients(writes: Writes, steps: Tensor, valid: Tensor | None, order: int) -> Coefficients:
    """``steps``: ``[batch, heads, time, writes]``, the step of token ``t`` along the gradient of write ``s``.

    A diagonal matrix is given as ``[batch, heads, time]``.
    """
    theta, eta, alpha = writes.theta, writes.eta, writes.alpha
    keep = torch.ones_like(theta) if alpha is None else 1 - alpha
    channels = keep.dim() == 4
    decay = products(keep.mT if channels else keep)
    counts = None if valid is None else valid.to(theta).view(valid.shape[0], *[1] * (2 + channels), -1)
    kept, moved = decay[..., 0], decay[..., 1:]
    if counts is not None:
        moved = moved * counts
    if order == 0 or eta is None:
        return Coefficients(kept, [], _steps(moved, steps, channels), [])
    momentum = products(eta)
    start, along = momentum[..., 0], momentum[..., 1:]
    carried = []
    for term in range(order):
        if term and counts is not None:
            moved = moved * counts
        carried.append((moved @ _at(start, channels).unsqueeze(-1)).squeeze(-1))
        moved = moved @ _at(along, channels)
    last = [([start[..., -1]], times_steps(along[..., -1:, :], steps).squeeze(-2))]
    if order == 2:
        twice = along[..., -1:, :] if counts is None else along[..., -1:, :] * counts.view(-1, 1, 1, theta.shape[2])
        first = (twice @ start.unsqueeze(-1)).squeeze(-1).squeeze(-1)
        last.append(([first, start[..., -1]], times_steps(twice @ along, steps).squeeze(-2)))
    return Coefficients(kept, carried[::-1], _steps(moved, steps, channels), last)


def _at(x: Tensor, channels: bool) -> Tensor:
    return x.unsqueeze(2) if channels else x


def _steps(x: Tensor, steps: Tensor, channels: bool) -> Tensor:
    if steps.dim() == 3:
        return x * (steps[:, :, None, None] if channels else steps.unsqueeze(-2))
    return x @ _at(steps, channels)


def window_weights(
    rule: Rule, writes: Writes, valid: Tensor | None, recent: Writes | None, held: Tensor | None
) -> Tensor:
    """``gamma_s`` where write ``s`` is in the window of token ``t``: ``[batch, heads, time, writes]``.

    For a window of one write, its diagonal ``[batch, heads, time]``. ``recent``: the writes before these, of which
    ``held`` ``[batch]`` are there.
    """
    gamma = torch.ones_like(writes.theta) if writes.gamma is None else writes.gamma
    if rule.window == 1 or recent is None or held is None:
        gamma = gamma.squeeze(-1) if gamma.dim() == 4 else gamma
        return gamma if valid is None else gamma * valid.unsqueeze(1)
    rows, _, time = gamma.shape[:3]
    device = gamma.device
    real = torch.ones(rows, time, dtype=torch.bool, device=device) if valid is None else valid
    index = real.cumsum(1) - 1
    past = torch.arange(1 - rule.window, 0, device=device).expand(rows, -1)
    distance = index.unsqueeze(-1) - torch.cat([past, index], 1).unsqueeze(1)
    source = torch.cat([past >= -held.unsqueeze(1), real], 1)
    inside = (distance >= 0) & (distance < rule.window) & source.unsqueeze(1) & real.unsqueeze(2)
    if gamma.dim() == 4:  # of each place in the window
        place = distance.clamp(0, rule.window - 1).unsqueeze(1).expand(rows, gamma.shape[1], -1, -1)
        return torch.where(inside.unsqueeze(1), gamma.gather(3, place), 0.0)
    if recent.gamma is not None:
        gamma = torch.cat([recent.gamma, gamma], 2)
    return torch.where(inside.unsqueeze(1), gamma.unsqueeze(2), 0.0)


def times_steps(x: Tensor, steps: Tensor) -> Tensor:
    """``x`` ``[..., time, time]`` times the matrix ``steps``, which may be given by its diagonal."""
    return x * steps.unsqueeze(-2) if steps.dim() == 3 else x @ steps
