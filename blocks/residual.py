"""``residual``: a block and a way round it, ``x + f(x)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..registry import Spec, create, register
from .block import Block, Decoder, as_memory, check_input, read_flops
from .decoding import decoder, reader
from .state import State


@register("residual")
class Residual(Block):
    """x + f(x): what goes in comes out beside what the block makes of it.

    Layers do this around each of their blocks; here it is for blocks inside others, which have no such way round. As
    ``attend`` of ``context``, for one, it lets the memory write what a token is as well as what attention found for
    it. State: that of ``of``. Around a memory it is a memory.
    """

    delegates = ("of",)

    def __init__(
        self, dim: int, *, of: Annotated[Spec, Field(description="the block that there is a way round")]
    ) -> None:
        super().__init__(dim)
        self.of = create(of, dim=dim)
        self.period = self.of.period
        self.grows = self.of.grows

    def init_state(self, batch_size: int) -> State:
        return self.of.init_state(batch_size)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        return self.every(x, state, step=1, mask=mask)

    def every(self, x: Tensor, state: State = None, *, step: int, mask: Tensor | None = None) -> tuple[Tensor, State]:
        check_input(self, x, mask)
        y, state = self.of(x, state, mask=mask) if step == 1 else self.of.every(x, state, step=step, mask=mask)
        around = x[:, step - 1 :: step]
        if mask is not None:
            around = around.masked_fill(~mask[:, step - 1 :: step, None], 0.0)
        return around + y, state

    def read(self, x: Tensor, state: State) -> Tensor:
        return x + as_memory(self.of).read(x, state)

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        return as_memory(self.of).write(x, state, mask)

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        inner = decoder(self.of, rows, time=time, step=step)

        def decode(x: Tensor, state: State) -> tuple[Tensor, State]:
            y, state = inner(x, state)
            return x[:, step - 1 :: step] + y, state

        return decode

    def reader(self, rows: int) -> Callable[[Tensor, State], Tensor]:
        """``read`` for many times one token of each of ``rows`` rows: see ``decoding.reader``."""
        inner = reader(as_memory(self.of), rows)
        return lambda x, state: x + inner(x, state)

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        y, state = self.of.prefix(tokens)
        return tokens + y, state

    def bound(self, tokens: int) -> None:
        self.of.bound(tokens)
        self.grows = self.of.grows

    def reset_parameters(self) -> None:
        """Owns no parameters."""

    def flops(self, length: int) -> int:
        return self.every_flops(length, 1)

    def every_flops(self, length: int, step: int) -> int:
        return self.of.every_flops(length, step) + length // step * self.dim

    def read_flops(self, length: int) -> int:
        return read_flops(self.of, length) + length * self.dim
