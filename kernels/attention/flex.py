"""Attention through FlexAttention: one mask function for window, start, prefix and step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import Prefix
from .sdpa import side_by_side


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel) if device == "cuda" else kernel


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, time, heads, d = q.shape
    keys, kv_heads = k.shape[1:3]
    always = 0
    if prefix is not None:
        always = prefix.k.shape[1]
        q, k, v = side_by_side(q, k, v, prefix)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        back = (query - (time - 1)) * step + (keys - 1 + always) - key  # tokens between the query's place and the key
        seen = back >= 0
        if window is not None:
            seen = seen & (back < window)
        if start is not None:
            seen = seen & (key - always >= start[row])
        return seen | (key < always)

    if q.device.type == "cpu":  # it refuses tensors that could want a gradient even where none is recorded
        q, k, v = q.detach(), k.detach(), v.detach()
    mask = create_block_mask(visible, None if start is None else rows, None, time, keys + always, device=q.device)
    y = _kernel(q.device.type)(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        scale=d**-0.5,
        enable_gqa=heads != kv_heads,
    )
    return y.transpose(1, 2)


def refuse_flex(*, device: str, dtype: torch.dtype, grad: bool = False, **facts: Any) -> str | None:
    if device == "cpu" and grad:
        return "it has no backward on the CPU"
    if device == "cuda" and dtype == torch.float64:
        return "its kernels have no float64"
    return None
