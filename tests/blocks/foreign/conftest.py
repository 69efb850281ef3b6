"""Modules as other libraries write them, adapted as blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import titans_build as tb
from titans_build.registry import scratch


@pytest.fixture
def own_registry() -> Iterator[None]:
    """Blocks that a test registers are removed after it."""
    with scratch():
        yield


class LSTMState(NamedTuple):
    hidden: Tensor
    cell: Tensor


@pytest.fixture(name="lstm")
def register_lstm(own_registry: None) -> type:
    def fresh(lstm: nn.LSTM, rows: int) -> LSTMState:
        zeros = lstm.weight_ih_l0.new_zeros(rows, lstm.num_layers, lstm.hidden_size)
        return LSTMState(zeros, zeros)

    def run(lstm: nn.LSTM, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        y, after = lstm(x, tuple(part.transpose(0, 1).contiguous() for part in state))
        return y, LSTMState(*(part.transpose(0, 1) for part in after))

    @tb.adapt("lstm", state=fresh, run=run)
    def lstm(dim: int, *, layers: Annotated[int, Field(ge=1, le=8, description="layers of the LSTM")] = 1) -> nn.Module:
        """A long short-term memory."""
        return nn.LSTM(dim, dim, layers, batch_first=True)

    return lstm


class Stepping(nn.Module):
    """A leaky sum that starts with any number of tokens, continues one at a time, and modifies its state."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)
        self.decay = nn.Parameter(torch.rand(dim))
        self.register_buffer("scale", torch.full((dim,), 0.5), persistent=False)

    def begin(self, x: Tensor, level: Tensor) -> Tensor:
        assert not level.any(), "only from the initial state"
        outputs = []
        for token in x.unbind(1):
            outputs.append(self.step(token.unsqueeze(1), level))
        return torch.cat(outputs, dim=1)

    def step(self, x: Tensor, level: Tensor) -> Tensor:
        assert x.shape[1] == 1, "one token at a time"
        after = torch.sigmoid(self.decay) * level.clone() + self.mix(x[:, 0])
        level.copy_(after)
        return (after * self.scale).unsqueeze(1)


@pytest.fixture(name="stepping")
def register_stepping(own_registry: None) -> type:
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


@pytest.fixture(name="pointwise")
def register_pointwise(own_registry: None) -> type:
    @tb.adapt("pointwise")
    def pointwise(dim: int, *, hidden: int = 8) -> nn.Module:
        """Two linear maps."""
        return nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))

    return pointwise
