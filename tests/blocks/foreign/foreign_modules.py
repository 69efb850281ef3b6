"""Modules as other libraries write them, and how each is declared."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

import titans_build as tb


class LongShort(NamedTuple):
    hidden: Tensor
    cell: Tensor


def register_lstm() -> type:
    def fresh(lstm: nn.LSTM, rows: int) -> LongShort:
        zeros = lstm.weight_ih_l0.new_zeros(rows, lstm.num_layers, lstm.hidden_size)
        return LongShort(zeros, zeros)

    def run(lstm: nn.LSTM, x: Tensor, state: LongShort) -> tuple[Tensor, LongShort]:
        y, after = lstm(x, tuple(part.transpose(0, 1).contiguous() for part in state))
        return y, LongShort(*(part.transpose(0, 1) for part in after))

    @tb.adapt("lstm", state=fresh, run=run)
    def lstm(
        dim: int, *, layers: Annotated[int, Field(ge=1, le=8, description="one above the other")] = 1
    ) -> nn.Module:
        """A long short-term memory."""
        return nn.LSTM(dim, dim, layers, batch_first=True)

    return lstm


class Stepping(nn.Module):
    """A leaky sum that is begun with any number of tokens, goes on one at a time, and writes over its state."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)
        self.decay = nn.Parameter(torch.rand(dim))
        self.register_buffer("scale", torch.full((dim,), 0.5), persistent=False)

    def begin(self, x: Tensor, level: Tensor) -> Tensor:
        assert not level.any(), "only from its beginning"
        outputs = []
        for token in x.unbind(1):
            outputs.append(self.step(token.unsqueeze(1), level))
        return torch.cat(outputs, dim=1)

    def step(self, x: Tensor, level: Tensor) -> Tensor:
        assert x.shape[1] == 1, "one token at a time"
        after = torch.sigmoid(self.decay) * level.clone() + self.mix(x[:, 0])
        level.copy_(after)
        return (after * self.scale).unsqueeze(1)


def register_stepping() -> type:
    @tb.adapt(
        "stepping",
        state=lambda module, rows: module.decay.new_zeros(rows, len(module.decay)),
        run=lambda module, x, level: (module.begin(x, level), level),
        step=lambda module, x, level: (module.step(x, level), level),
    )
    def stepping(dim: int) -> nn.Module:
        """A leaky sum."""
        return Stepping(dim)

    return stepping


def register_pointwise() -> type:
    @tb.adapt("pointwise")
    def pointwise(dim: int, *, hidden: int = 8) -> nn.Module:
        """Two linear maps."""
        return nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))

    return pointwise
