"""Attention as it is defined: a dense mask over every query and key. What a query sees, and nothing that is fast."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Prefix(NamedTuple):
    """Persistent tokens that every query sees, wherever it stands."""

    q: Tensor
    """``[batch, T, heads, d]``: the queries, without positions."""
    k: Tensor
    """``[batch, P, kv_heads, d]``."""
    v: Tensor
    """``[batch, P, kv_heads, d]``."""


def visible_keys(
    time: int, keys: int, window: int | None, start: Tensor | None, device: torch.device, step: int = 1
) -> Tensor:
    """Bool ``[batch or 1, time, keys]``: the definition of what is seen, prefix aside."""
    query = torch.arange(1 - time, 1, device=device)[:, None] * step + (keys - 1)
    key = torch.arange(keys, device=device)
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    return visible[None] if start is None else visible & (key >= start[:, None, None])


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> Tensor:
    time, heads, keys, kv_heads = q.shape[1], q.shape[2], k.shape[1], k.shape[2]

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(heads // kv_heads, dim=2)) * q.shape[-1] ** -0.5

    visible = visible_keys(time, keys, window, start, q.device, step)[:, None]
    score = scores(q, k)
    if prefix is not None:
        score = torch.cat((scores(prefix.q, prefix.k), score), dim=-1)
        visible = F.pad(visible, (prefix.k.shape[1], 0), value=True)
        v = torch.cat((prefix.v, v), dim=1)
    # the lowest finite score and a product, not -inf: a query that sees nothing then has finite gradients too
    score = score.masked_fill(~visible, torch.finfo(score.dtype).min)
    weight = score.softmax(dim=-1) * visible
    return torch.einsum("bhts,bshd->bthd", weight, v.repeat_interleave(heads // kv_heads, dim=2))
