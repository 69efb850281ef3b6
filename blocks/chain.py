"""``chain``: blocks one after the other, ``x -> f(x) -> g(f(x)) -> ...``. In a recipe, a list of blocks is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..registry import Spec, create, register
from .block import Block, Blocks, Decoder, as_memory, check_parts, read_flops
from .decoding import decoder, reader
from .state import State


@register("chain")
class Chain(Block):
    """Blocks one after the other: the outputs of each are the inputs of the next.

    Nothing is added around them: normalisation and the residual are the layer's. State: a tuple of theirs. A chain of
    memories is a memory, in which each is read with what the one before recalls.
    """

    delegates = ("of",)

    def __init__(
        self, dim: int, *, of: Annotated[list[Spec], Field(min_length=1, description="the blocks, first to last")]
    ) -> None:
        super().__init__(dim)
        self.of = Blocks(create(spec, dim=dim) for spec in of)
        self.period = math.lcm(*(block.period for block in self.of))
        self.grows = any(block.grows for block in self.of)

    def init_state(self, batch_size: int) -> State:
        return tuple(block.init_state(batch_size) for block in self.of)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        states = []
        if state is None:
            state = (None,) * len(self.of)
        check_parts(self, state, len(self.of))
        for block, before in zip(self.of, state):
            x, after = block(x, before, mask=mask)
            states.append(after)
        return x, tuple(states)

    def read(self, x: Tensor, state: State) -> Tensor:
        check_parts(self, state, len(self.of))
        for block, before in zip(self.of, state):
            x = as_memory(block).read(x, before)
        return x

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        return self(x, state, mask=mask)[1]

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        if step != 1:
            return None
        parts = [decoder(block, rows, time=time) for block in self.of]

        def decode(x: Tensor, state: State) -> tuple[Tensor, State]:
            states = []
            for part, before in zip(parts, state):
                x, after = part(x, before)
                states.append(after)
            return x, tuple(states)

        return decode

    def reader(self, rows: int) -> Callable[[Tensor, State], Tensor]:
        """``read`` for many times one token of each of ``rows`` rows: see ``decoding.reader``."""
        parts = [reader(as_memory(block), rows) for block in self.of]

        def read(x: Tensor, state: State) -> Tensor:
            for part, before in zip(parts, state):
                x = part(x, before)
            return x

        return read

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        """Each block's outputs at the persistent tokens are the persistent tokens of the next."""
        states = []
        for block in self.of:
            tokens, state = block.prefix(tokens)
            states.append(state)
        return tokens, tuple(states)

    def bound(self, tokens: int) -> None:
        for block in self.of:
            block.bound(tokens)
        self.grows = any(block.grows for block in self.of)

    def reset_parameters(self) -> None:
        """Owns no parameters."""

    def flops(self, length: int) -> int:
        return sum(block.flops(length) for block in self.of)

    def read_flops(self, length: int) -> int:
        return sum(read_flops(block, length) for block in self.of)
