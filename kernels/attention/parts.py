"""What a query sees, as parts whose masks libraries know by name, and one softmax over several of them.

The masks: every key, or causal with queries at the last keys, with or without a window. Everything else is composed of
such parts, merged by their log-sum-exp:

* a prefix is a part without a mask, with its own queries;
* where queries stand at every ``step``-th key, the keys are ``step`` interleaved streams, and each is a causal part: of
  the stream that ends ``lag`` keys before the last query, a query sees the keys not after it, and of a window of ``w``
  keys the last ``(w - lag) / step``, rounded up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Prefix

WIDEST = 256
"""Largest head that the kernels of FlashAttention take, in steps of ``ALIGNED``."""
ALIGNED = 8


class Part(NamedTuple):
    """Attention under one mask. Keys and values have a head for each query head, and all are aligned."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    """Queries stand at the last keys and see none after them; else every query sees every key."""
    window: int | None
    """Keys in sight where it is causal, the query's own included; ``None``: all."""
    start: Tensor | None
    """``[batch]`` int64: the first key of each row; ``None``: 0."""


def parts(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> list[Part]:
    """The visible keys as parts, which share one softmax."""
    heads, keys = q.shape[2], k.shape[1]
    found = []
    whole = step > 1 and keys % step == 0
    if whole:  # so that the gradients of all streams are put together at once
        streams = [x.unflatten(1, (-1, step)).unbind(2) for x in (k, v)]
    for lag in range(min(step, keys)):
        reach = None if window is None else -(-(window - lag) // step)
        if reach is not None and reach <= 0:
            continue
        first = (keys - 1 - lag) % step
        count = -(-(keys - first) // step)
        begin = None if start is None else (start - first + step - 1).div(step, rounding_mode="floor").clamp(0, count)
        if reach is not None and reach >= count:
            reach = None
        stream = [x[first] for x in streams] if whole else [x[:, first::step] for x in (k, v)]
        found.append(Part(q, stream[0], stream[1], True, reach, begin))
    if prefix is not None:
        found.append(Part(*prefix, False, None, None))
    return [p._replace(q=_aligned(p.q), k=_per_head(p.k, heads), v=_per_head(p.v, heads)) for p in found]


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values for every query head: not all kernels for groups of heads have a backward."""
    return _aligned(x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2))


def _aligned(x: Tensor) -> Tensor:
    """Aligned as the kernels assume without a check: they read 16 bytes at a time."""
    apart = [step for step, size in zip(x.stride(), x.shape) if size > 1]
    if x.stride(-1) == 1 and not any(step % ALIGNED for step in apart[:-1]) and not x.storage_offset() % ALIGNED:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def merge(*found: tuple[Tensor, Tensor]) -> Tensor:
    """One softmax over parts, from the output ``[batch, T, heads, d]`` and log-sum-exp ``[batch, T, heads]`` of each.

    The log-sum-exp is ``-inf`` where a query sees no key of the part; its output is then zero.
    """
    sums = torch.stack([lse for _, lse in found])
    # a query that sees nothing at all has equal weights, not NaN, and zero
    weights = sums.clamp(min=torch.finfo(sums.dtype).min).softmax(0).unsqueeze(-1).unbind()
    y = found[0][0]
    return sum(out * weight for (out, _), weight in zip(found, weights)).to(y.dtype)  # type: ignore[union-attr]


def refuse_flash_form(*, dtype: torch.dtype, width: int = ALIGNED, **facts: object) -> str | None:
    """Why the kernels of FlashAttention do not take tensors of these, or ``None``. ``width``: of a head."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype}"
    if width > WIDEST or width % ALIGNED:
        return f"takes heads of up to {WIDEST} numbers in steps of {ALIGNED}, not {width}"
    return None
