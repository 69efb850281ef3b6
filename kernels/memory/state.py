"""The state of a neural memory: fast weights, momentum, the anchor of the current chunk, and the position."""

from __future__ import annotations

from collections.abc import Iterable
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

        Args:
            weights: for each layer ``[batch, heads, out, in]``, float32 or float64, all of one dtype and device; what
                goes out of a layer goes into the next.
            momentum: of the shapes of the weights; ``()`` in a memory that never has momentum.

        Raises ``ValueError`` or ``TypeError`` naming the tensor that does not fit.
        """
        weights = _stack("weights", weights)
        if not weights:
            raise ValueError("weights: expected a tuple of [batch, heads, out, in], one for each layer, got none")
        first = weights[0]
        if first.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weights[0]: expected float32 or float64, got {first.dtype}")
        width = first.shape[3] if first.dim() == 4 else None
        for layer, weight in enumerate(weights):
            if weight.dim() != 4 or weight.shape[:2] != first.shape[:2] or weight.shape[3] != width:
                rows = ", ".join(map(str, first.shape[:2])) if layer else "batch, heads"
                into = f"in={width}" if layer else "in"
                raise ValueError(f"weights[{layer}]: expected [{rows}, out, {into}], got {list(weight.shape)}")
            width = weight.shape[2]
        if momentum is None:
            momentum = tuple(weight.new_zeros(weight.shape) for weight in weights)
        momentum = _stack("momentum", momentum)
        if momentum and len(momentum) != len(weights):
            raise ValueError(f"momentum: expected one tensor for each of {len(weights)} layers, got {len(momentum)}")
        for layer, (given, weight) in enumerate(zip(momentum, weights)):
            if given.shape != weight.shape:
                raise ValueError(
                    f"momentum[{layer}]: expected {list(weight.shape)} as weights[{layer}], got {list(given.shape)}"
                )
        for name, part in (("weights", weights), ("momentum", momentum)):
            for layer, given in enumerate(part):
                if given.dtype != first.dtype:
                    raise TypeError(f"{name}[{layer}]: expected {first.dtype} as weights[0], got {given.dtype}")
                if given.device != first.device:
                    raise ValueError(
                        f"{name}[{layer}]: expected device {first.device} as weights[0], got {given.device}"
                    )
        position = torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)
        return cls(weights, momentum, weights, position)


def _stack(name: str, given: Iterable[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected a tuple of tensors, one for each layer, got {type(given).__name__}")
    tensors = tuple(given)
    for layer, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{layer}]: expected a tensor, got {type(tensor).__name__}")
    return tensors
