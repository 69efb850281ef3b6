"""A layer: a list of blocks, each pre-normed and residual."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..registry import Spec, create
from .block import Block, Blocks, Decoder, check_parts
from .decoding import decoder
from .normalisation import RMSNorm
from .state import State


class Layer(Block):
    """``x = x + block(norm(x))`` for each block of a list. State: a tuple of theirs."""

    def __init__(self, dim: int, *, of: Sequence[Spec]) -> None:
        super().__init__(dim)
        self.norms = Blocks(RMSNorm(dim) for _ in of)
        self.blocks = Blocks(create(spec, dim=dim) for spec in of)
        self.period = math.lcm(*(block.period for block in self.blocks))
        self.grows = any(block.grows for block in self.blocks)

    def init_state(self, batch_size: int) -> State:
        return tuple(block.init_state(batch_size) for block in self.blocks)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        if mask is not None:
            # the residual would carry what stands at a masked token to the outputs
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        states = []
        if state is None:
            state = (None,) * len(self.blocks)
        check_parts(self, state, len(self.blocks))
        for norm, block, before in zip(self.norms, self.blocks, state):
            y, after = block(norm(x)[0], before, mask=mask)
            x = x + y
            states.append(after)
        return x, tuple(states)

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        if step != 1:
            return None
        parts = [
            (decoder(norm, rows, time=time), decoder(block, rows, time=time))
            for norm, block in zip(self.norms, self.blocks)
        ]

        def decode(x: Tensor, state: State) -> tuple[Tensor, State]:
            states = []
            for (normed, part), before in zip(parts, state):
                y, after = part(normed(x, None)[0], before)
                x = x + y
                states.append(after)
            return x, tuple(states)

        return decode

    def bound(self, tokens: int) -> None:
        for block in self.blocks:
            block.bound(tokens)
        self.grows = any(block.grows for block in self.blocks)

    def reset_parameters(self) -> None:
        """Owns no parameters."""

    def flops(self, length: int) -> int:
        return sum(block.flops(length) for block in [*self.norms, *self.blocks])
