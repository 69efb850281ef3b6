"""``persistent``: learned tokens that a block has always already seen (equation 19)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ..registry import Spec, create, register
from .block import Block, Decoder, as_memory, as_rows, read_flops
from .decoding import decoder, reader
from .state import State


@register("persistent")
class Persistent(Block):
    """Learned tokens before the sequence: ``[P | x]``, with outputs at ``x`` alone.

    They only make the fresh state: a memory has written them, attention keeps them in sight for good. From then
    on the block inside runs as it is, so persistent tokens cost nothing per token and nothing when decoding. Around
    a memory it is a memory that starts with them written.
    """

    delegates = ("of",)

    def __init__(
        self,
        dim: int,
        *,
        tokens: Annotated[int, Field(ge=1, le=2**16, description="number of learned tokens before the sequence")] = 16,
        of: Annotated[Spec, Field(description="the block that has read them")],
    ) -> None:
        super().__init__(dim)
        self.of = create(of, dim=dim)
        self.tokens = nn.Parameter(torch.empty(tokens, dim))
        self.period = self.of.period
        self.grows = self.of.grows

    def init_state(self, batch_size: int) -> State:
        # every row starts from the same state: it is computed once
        return as_rows(self.of.prefix(self.tokens.unsqueeze(0))[1], batch_size)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        return self.of(x, state if state is not None else self.init_state(x.shape[0]), mask=mask)

    def read(self, x: Tensor, state: State) -> Tensor:
        return as_memory(self.of).read(x, state)

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        return as_memory(self.of).write(x, state, mask)

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        return decoder(self.of, rows, time=time, step=step)

    def reader(self, rows: int) -> Callable[[Tensor, State], Tensor]:
        """``read`` for many times one token of each of ``rows`` rows: see ``decoding.reader``."""
        return reader(as_memory(self.of), rows)

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        """The given tokens stand before this block's own."""
        rows, given, _ = tokens.shape
        y, state = self.of.prefix(torch.cat([tokens, self.tokens.expand(rows, -1, -1)], dim=1))
        return y[:, :given], state

    def bound(self, tokens: int) -> None:
        self.of.bound(tokens)
        self.grows = self.of.grows

    def reset_parameters(self) -> None:
        nn.init.normal_(self.tokens, std=0.02)

    def flops(self, length: int) -> int:
        return self.of.flops(self.tokens.shape[0] + length)

    def read_flops(self, length: int) -> int:
        return read_flops(self.of, length)
