"""The state of a neural memory: fast weights, momentum, the anchor of the current chunk, and the position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MemoryState(NamedTuple):
    """What a memory carries from token to token. Every tensor has the batch row first.

    With ``L`` layers, head ``h`` of row ``b`` holds matrices ``weights[l][b, h]`` of shape ``[out_l, in_l]``.
    """

    weights: tuple[Tensor, ...]
    """Fast weights ``W_1..W_L`` after the last token read, ``[batch, heads, out, in]``, float32 or float64."""
    momentum: tuple[Tensor, ...]
    """Momentum ``S_1..S_L``, same shapes; ``()`` in a memory that never has momentum."""
    anchor: tuple[Tensor, ...]
    """The weights at the start of the current chunk, where this chunk's gradients are taken."""
    position: Tensor
    """``[batch]`` int64: tokens read so far by each row."""

    @classmethod
    def fresh(cls, weights: tuple[Tensor, ...], momentum: tuple[Tensor, ...] | None = None) -> MemoryState:
        """A state that has read nothing: the given initial weights, zero momentum unless given, position zero.

        Raises ``ValueError`` when there are no weights.
        """
        weights = tuple(weights)
        if not weights:
            raise ValueError("weights: expected a tuple of [batch, heads, out, in], one for each layer, got none")
        if momentum is None:
            momentum = tuple(weight.new_zeros(weight.shape) for weight in weights)
        position = torch.zeros(weights[0].shape[0], dtype=torch.int64, device=weights[0].device)
        return cls(weights, tuple(momentum), weights, position)
