"""Attention through FlexAttention: one mask for window, start and step, merged with the prefix by log-sum-exp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autograd import refuse_second_derivative
from .parts import merge
from .reference import Prefix

BLOCK = 128
"""Queries and keys of a block, which is skipped, computed as it is, or computed under the mask."""


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel) if device == "cuda" else kernel


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> Tensor:
    if q.device.type == "cpu":  # it refuses tensors that could want a gradient even where none is recorded
        q, k, v = q.detach(), k.detach(), v.detach()
        prefix = None if prefix is None else Prefix(*(x.detach() for x in prefix))
    mask = _block_mask(q.shape[1], k.shape[1], window, start, step, q.device)
    if prefix is None:
        y = _attend(q, k, v, mask)
    else:
        y = merge(_attend(q, k, v, mask, with_sums=True), _attend(*prefix, None, with_sums=True))
    return refuse_second_derivative(y, "attention: flex; name another, such as backend='reference'")


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, with_sums: bool = False) -> Any:
    """The output ``[batch, T, heads, d]``, and with sums the log-sum-exp ``[batch, T, heads]``."""
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = _kernel(q.device.type)(
        q, k, v, block_mask=mask, scale=q.shape[-1] ** -0.5, enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True) if with_sums else None,
    )  # fmt: skip
    return (found[0].transpose(1, 2), found[1].lse.transpose(1, 2)) if with_sums else found.transpose(1, 2)


def _block_mask(time: int, keys: int, window: int | None, start: Tensor | None, step: int, device: torch.device) -> Any:
    """The mask of ``reference.visible_keys``. ``create_block_mask`` would make all of it, ``time x keys``."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = _blocks.__wrapped__ if torch.compiler.is_compiling() else _blocks

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        back = (query - (time - 1)) * step + (keys - 1) - key  # tokens between the query's place and the key
        seen = back >= 0
        if window is not None:
            seen = seen & (back < window)
        return seen if start is None else seen & (key >= start[row])

    found = blocks(time, keys, window, step, start is None, device)
    return BlockMask.from_kv_blocks(*found, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(time, keys))


@functools.lru_cache(maxsize=32)
def _blocks(
    time: int, keys: int, window: int | None, step: int, whole: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each block of queries: how many blocks of keys are computed under the mask, and which; and as they are.

    ``whole=False``: all under the mask, because it depends on the row. int32 ``[1, 1, blocks]`` and
    ``[1, 1, blocks, blocks of keys]``: 4 MB at 131,072 tokens.
    """
    with torch.inference_mode(False):
        first = torch.arange(0, time, BLOCK, device=device)
        last = (first + BLOCK - 1).clamp(max=time - 1)
        near, far = ((at - (time - 1)) * step + (keys - 1) for at in (first, last))  # places of a block's queries
        begin = torch.arange(0, keys, BLOCK, device=device)
        end = begin + BLOCK - 1
        near, far = near[:, None], far[:, None]
        seen = begin <= far
        inside = (end <= near) & (end < keys)
        if window is not None:
            seen = seen & (end > near - window)
            inside = inside & (begin > far - window)
        inside = inside & whole
        found: list[Tensor] = []
        for chosen in (seen & ~inside, inside):
            order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
            found += [x.to(torch.int32)[None, None] for x in (chosen.sum(1), order)]
    return found[0], found[1], found[2], found[3]


def refuse_flex(
    *,
    device: str,
    dtype: torch.dtype,
    grad: bool = False,
    masked: bool = True,
    large: bool = True,
    named: bool = False,
    **facts: Any,
) -> str | None:
    """Why it cannot run, or ``None``. ``masked``: as of ``flash``. ``large``: many queries and keys."""
    if device == "cpu" and grad:
        return "it has no backward on the CPU"
    if device == "cuda" and dtype == torch.float64:
        return "its kernels have no float64"
    if not named and device != "cuda":
        return f"is for GPUs, on {device} it has to be named"
    if not named and not (masked and large):
        return "is compiled, which pays for many queries under a mask"
    return None
