"""Where tokens stand in time: moving the real tokens of each row together, and to the right phase.

A mask may hide tokens anywhere in a row, and rows of one batch may be at different positions. Every
sequential operation reduces both to one case: ``spread`` puts real token ``i`` of row ``b`` into slot
``offset[b] + i`` of a grid in which all other slots are empty, and ``collect`` brings results back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import on_host, placed


class Layout(NamedTuple):
    """A one-to-one map between the real tokens of ``[batch, time]`` and slots of ``[batch, slots]``."""

    source: Tensor | None
    """``[batch, slots]`` int64: the token in each slot (0 where the slot is empty); ``None``: in its own."""
    filled: Tensor
    """``[batch, slots]`` bool: the slot holds a token."""
    target: Tensor
    """``[batch, time]`` int64: the slot of each token (0 where the token is masked)."""
    mask: Tensor
    """``[batch, time]`` bool: the token is real."""
    length: Tensor
    """``[batch]`` int64: real tokens in each row."""

    def spread(self, x: Tensor, empty: float = 0.0) -> Tensor:
        """``[batch, time, ...]`` -> ``[batch, slots, ...]``, ``empty`` where a slot holds no token."""
        if self.source is None:
            return x[:, : self.filled.shape[1]].masked_fill(~_like(self.filled, x), empty)
        return _gather(x, self.source, self.filled, empty)

    def collect(self, y: Tensor) -> Tensor:
        """``[batch, slots, ...]`` -> ``[batch, time, ...]``, zero at masked tokens."""
        if self.source is None:
            y = y.masked_fill(~_like(self.filled, y), 0.0)
            return F.pad(y, (*[0, 0] * (y.dim() - 2), 0, self.mask.shape[1] - y.shape[1]))
        return _gather(y, self.target, self.mask, 0.0)


def align(mask: Tensor, offset: Tensor | None = None, multiple: int = 1, slots: int | None = None) -> Layout:
    """Lay real tokens side by side, row ``b`` from slot ``offset[b]`` on (0 if not given).

    ``mask``: ``[batch, time]`` bool. ``offset``: ``[batch]`` int64, >= 0. The number of slots is the smallest
    multiple of ``multiple`` that holds every row, or ``slots``, which must. Under ``torch.compile``, which does not
    know how many tokens are real, it is enough for all; an offset then asks for ``slots``.
    """
    rows, time = mask.shape
    if not (mask.is_cpu or torch.compiler.is_compiling()):
        # an accelerator is waited for once, where the mask is first looked at, and not by every block
        found = align(on_host(mask), None if offset is None else on_host(offset), multiple, slots)
        placed_here: list[Any] = [None if x is None else placed(x, mask.device) for x in found]
        return Layout(*placed_here)._replace(mask=mask)
    length = mask.sum(dim=1)
    direct = offset is None and slots is None and multiple == 1 and not torch.compiler.is_compiling()
    if offset is None:
        offset = torch.zeros_like(length)
    if slots is None and torch.compiler.is_compiling():
        slots = -(-time // multiple) * multiple
    if slots is None:
        need = int((offset + length).max()) if rows else 0
        slots = -(-need // multiple) * multiple
    if direct and not bool((mask[:, 1:] & ~mask[:, :-1]).any()):  # the padding is at the end
        return Layout(
            None, mask[:, :slots], torch.arange(time, device=mask.device).expand_as(mask) * mask, mask, length
        )
    # a stable sort of "is padding" lists each row's real tokens first, in order
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    slot = torch.arange(slots, device=mask.device)[None, :] - offset[:, None]
    filled = (slot >= 0) & (slot < length[:, None])
    source = order.gather(1, slot.clamp(0, time - 1)) * filled if time else torch.zeros_like(slot)
    target = (mask.cumsum(dim=1) - 1 + offset[:, None]) * mask
    return Layout(source, filled, target, mask, length)


def _like(filled: Tensor, x: Tensor) -> Tensor:
    return filled.view(*filled.shape, *[1] * (x.dim() - 2))


def _gather(x: Tensor, index: Tensor, keep: Tensor, empty: float) -> Tensor:
    tail = x.shape[2:]
    if x.shape[1] == 0:
        return x.new_full((x.shape[0], index.shape[1], *tail), empty)
    shape = (*index.shape, *[1] * len(tail))
    picked = x.gather(1, index.view(shape).expand(*index.shape, *tail))
    return torch.where(keep.view(shape), picked, torch.full((), empty, dtype=x.dtype, device=x.device))


def last(x: Tensor, length: Tensor, count: int) -> Tensor:
    """The ``count`` entries of ``x`` [batch, time, ...] that end at index ``length[b]`` (exclusive), per row."""
    index = length[:, None] - count + torch.arange(count, device=x.device)[None, :]
    tail = x.shape[2:]
    shape = (*index.shape, *[1] * len(tail))
    return x.gather(1, index.view(shape).expand(*index.shape, *tail))
