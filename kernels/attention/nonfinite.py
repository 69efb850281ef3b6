"""Keys and values that are not finite: the queries that see one get NaN, and no other query hears of it.

Attention multiplies what a query does not see by zero, and zero times NaN is NaN. So keys and values that are not
finite are set to zero, and the queries that see them are marked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..finite_check import surely_finite


def without_infinities(
    k: Tensor, v: Tensor, queries: int, window: int | None, start: Tensor | None, step: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``k``, ``v`` with zeros for what is not finite, and who saw it: bool ``[batch, queries, kv_heads]``.

    ``None`` where everything is finite. Arguments as of ``attention``.
    """
    if surely_finite(k, v):
        return None
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    if not bool(bad.any()):
        return None
    keys = k.shape[1]
    place = torch.arange(1 - queries, 1, device=k.device) * step + (keys - 1)
    first = torch.zeros_like(place) if window is None else (place - window + 1).clamp(min=0)
    first = first.expand(k.shape[0], -1)
    if start is not None:
        first = torch.maximum(first, start.unsqueeze(1)).clamp(max=keys)
    # how many there are before each key, and after the last
    count = torch.nn.functional.pad(bad.cumsum(1), (0, 0, 1, 0))
    until = count[:, place + 1]
    before = count.gather(1, first.unsqueeze(-1).expand_as(until))
    zero = bad.unsqueeze(-1)
    return k.masked_fill(zero, 0.0), v.masked_fill(zero, 0.0), until > before
