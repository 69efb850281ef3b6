"""The block ``bottleneck``: all that follows a position is said from the features at that position (``compression``).

A recipe names this module in ``imports``.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ...blocks.block import Block
from ...blocks.combinators import Layer
from ...blocks.layers import RMSNorm
from ...blocks.state import State
from ...registry import Spec, register


class BottleneckState(NamedTuple):
    """The state of a ``Bottleneck``."""

    of: State
    """That of the blocks inside."""
    features: Tensor
    """``[batch, dim]``: the features at position ``after``, zero before it."""
    position: Tensor
    """``[batch]`` int64: the number of tokens so far."""


@register("bottleneck")
class Bottleneck(Block):
    """Encodes tokens ``0`` to ``after`` with the blocks ``of``; from there on, the output is what token ``after`` gave.

    Each block of ``of`` has a norm before it and a residual connection. The output at position ``after + i`` is their
    normalized output at position ``after`` plus a sinusoidal code of ``i`` (arXiv 1706.03762), and zero before. Later
    tokens are not read. Feed-forward networks after this block decode, as in the compression task of MAD
    (arXiv 2403.17844). It depends on absolute positions, so it obeys every law but ``position``.
    """

    def __init__(
        self,
        dim: int,
        *,
        of: Annotated[list[Spec], Field(min_length=1, description="the blocks that encode, in order")],
        after: Annotated[int, Field(ge=0, description="the position whose features are decoded")] = 31,
    ) -> None:
        super().__init__(dim)
        self.after = after
        self.of = Layer(dim, of=of)
        self.norm = RMSNorm(dim)

    def init_state(self, batch_size: int) -> BottleneckState:
        gain = self.norm.gain
        position = torch.zeros(batch_size, dtype=torch.int64, device=gain.device)
        return BottleneckState(self.of.init_state(batch_size), gain.new_zeros(batch_size, self.dim), position)

    def forward(
        self, x: Tensor, state: BottleneckState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, BottleneckState]:
        before = self.init_state(x.shape[0]) if state is None else state
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        beyond = before.position[:, None] + valid.cumsum(1) - 1 - self.after
        y, inside = self.of(x, before.of, mask=valid & (beyond <= 0))
        here = valid & (beyond == 0)
        found = torch.where(here[..., None], y, 0.0).sum(1)
        features = torch.where(here.any(1, keepdim=True), found, before.features)
        said = self.norm(features[:, None])[0] + self._code(beyond)
        output = torch.where((valid & (beyond >= 0))[..., None], said, 0.0)
        return output, BottleneckState(inside, features, before.position + valid.sum(1))

    def _code(self, numbers: Tensor) -> Tensor:
        """``[batch, time, dim]`` sines and cosines of numbers ``[batch, time]``."""
        pairs = torch.arange(self.dim, device=numbers.device) // 2
        angles = numbers[..., None].double() * torch.exp(pairs * (-2 * math.log(10000.0) / self.dim))
        quarter = torch.arange(self.dim, device=numbers.device) % 2 * (math.pi / 2)
        return torch.sin(angles + quarter).to(self.norm.gain.dtype)
