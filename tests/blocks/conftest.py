"""A small memory with known mathematics, for tests of what is built around memories."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from titans_build.blocks.block import Block
from titans_build.registry import catalogue


class LeakyState(NamedTuple):
    level: Tensor
    """``[batch, dim]``"""
    position: Tensor
    """``[batch]`` int64"""


class Leaky(Block):
    """A leaky integrator per feature, ``s = decay * s + W x``, with ``read`` and ``write``. Token by token."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.weight = nn.Parameter(torch.empty(dim, dim))
        self.start = nn.Parameter(torch.empty(dim))
        self.decay = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.dim**-0.5)
        nn.init.normal_(self.start)
        nn.init.normal_(self.decay)

    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.start.dtype, torch.float32)

    def init_state(self, batch_size: int) -> LeakyState:
        level = self.start.to(self.state_dtype()).expand(batch_size, -1)
        return LeakyState(level, torch.zeros(batch_size, dtype=torch.int64, device=level.device))

    def update(self, level: Tensor, x: Tensor) -> Tensor:
        return torch.sigmoid(self.decay) * level + torch.tanh(x @ self.weight.T).to(level.dtype)

    def output(self, level: Tensor, x: Tensor) -> Tensor:
        return (level * torch.tanh(x)).to(x.dtype)

    def forward(self, x, state=None, *, mask=None):
        state = self.init_state(x.shape[0]) if state is None else state
        level, position = state
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        outputs = []
        for t in range(x.shape[1]):
            real = mask[:, t : t + 1]
            level = torch.where(real, self.update(level, x[:, t]), level)
            outputs.append(torch.where(real, self.output(level, x[:, t]), 0.0))
        return torch.stack(outputs, dim=1), LeakyState(level, position + mask.sum(dim=1))

    def read(self, x: Tensor, state: LeakyState) -> Tensor:
        return self.output(state.level.unsqueeze(1), x)

    def write(self, x: Tensor, state: LeakyState, mask: Tensor | None = None) -> LeakyState:
        return self.forward(x, state, mask=mask)[1]


@pytest.fixture
def leaky():
    """The class; registered as ``leaky`` while the test runs."""
    with catalogue.scratch():
        catalogue.register("leaky")(Leaky)
        yield Leaky


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are slower on more threads, and the suite runs in several processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
