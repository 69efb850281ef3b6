"""``gate``: two branches over the same inputs, one gating the other; and the gating itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from ..kernels.norm_gate import gate, rms_norm
from ..kernels.norm_gate.decode import prepare_gate
from ..registry import Spec, create, register
from .block import Block, Blocks, Decoder, as_memory, check_input, check_parts, read_flops
from .decoding import decoder, reader, unobserved
from .state import State
from .watching import watches

Form = Literal["sigmoid", "silu", "sum"]


class Gating(nn.Module):
    """``gate(a, b) = norm(a) * sigmoid(norm(b))``, each normalised with a learned vector (paper 4.2).

    Other forms: ``silu`` in place of the sigmoid; ``sum``, ``norm(a) + norm(b)``. Zero inputs give zero in every
    form, which keeps masked tokens at zero.
    """

    eps = 1e-6

    def __init__(self, dim: int, form: Form = "sigmoid") -> None:
        super().__init__()
        self.form = form
        self.gain_a = nn.Parameter(torch.empty(dim))
        self.gain_b = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain_a)
        nn.init.ones_(self.gain_b)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``a``, ``b``, output: ``[..., dim]``."""
        if self.form == "sigmoid":
            return gate(a, b, self.gain_a, self.gain_b, self.eps)
        a, b = rms_norm(a, self.gain_a, self.eps), rms_norm(b, self.gain_b, self.eps)
        return a * silu(b) if self.form == "silu" else a + b

    def opening(self, b: Tensor) -> Tensor:
        """What the first branch, normalised, is multiplied with: of the second's outputs ``[..., dim]``."""
        if self.form == "sum":
            return torch.ones_like(b)
        b = rms_norm(b, self.gain_b, self.eps)
        return silu(b) if self.form == "silu" else torch.sigmoid(b)

    def prepared(self, rows: int, time: int) -> Callable[[Tensor, Tensor], Tensor]:
        """``forward`` for many times ``[rows, time, dim]``; what it gives may be written over by the next call."""
        run = None
        if self.form == "sigmoid" and unobserved(self):
            run = prepare_gate(self.gain_a, self.gain_b, (rows, time), self.eps)
        return self if run is None else run


@register("gate")
class Gate(Block):
    """Two branches over the same inputs, the second gating the first: ``gate(a(x), b(x))``.

    With attention and memory as branches and persistent tokens before them this is memory-as-gate (equations
    26-28). State: a tuple of theirs. With two memories as branches it is a memory.
    """

    delegates = ("branches",)

    def __init__(
        self,
        dim: int,
        *,
        branches: Annotated[
            list[Spec], Field(min_length=2, max_length=2, description="the block that is gated, and the one that gates")
        ],
        form: Annotated[
            Form, Field(description="norm(a) times sigmoid or silu of norm(b), or plus norm(b)")
        ] = "sigmoid",
    ) -> None:
        super().__init__(dim)
        self.branches = Blocks(create(spec, dim=dim) for spec in branches)
        self.gate = Gating(dim, form)
        self.period = math.lcm(*(block.period for block in self.branches))
        self.grows = any(block.grows for block in self.branches)

    def init_state(self, batch_size: int) -> State:
        return tuple(block.init_state(batch_size) for block in self.branches)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        check_input(self, x, mask, like=self.gate.gain_a)
        left, right = self.branches
        before = state if state is not None else (None, None)
        check_parts(self, before, 2)
        a, after_a = left(x, before[0], mask=mask)
        b, after_b = right(x, before[1], mask=mask)
        for watch in watches(self):
            watch.gated(self, self.gate.opening(b), a, b, mask)
        return self.gate(a, b), (after_a, after_b)

    def read(self, x: Tensor, state: State) -> Tensor:
        check_parts(self, state, 2)
        a, b = (as_memory(block).read(x, before) for block, before in zip(self.branches, state))
        return self.gate(a, b)

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        return self(x, state, mask=mask)[1]

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        if step != 1:
            return None
        left, right = (decoder(block, rows, time=time) for block in self.branches)
        gate = self.gate.prepared(rows, time)

        def decode(x: Tensor, state: State) -> tuple[Tensor, State]:
            a, after_a = left(x, state[0])
            b, after_b = right(x, state[1])
            for watch in watches(self):
                watch.gated(self, self.gate.opening(b), a, b, None)
            return gate(a, b), (after_a, after_b)

        return decode

    def reader(self, rows: int) -> Callable[[Tensor, State], Tensor]:
        """``read`` for many times one token of each of ``rows`` rows: see ``decoding.reader``."""
        left, right = (reader(as_memory(block), rows) for block in self.branches)
        gate = self.gate.prepared(rows, 1)
        return lambda x, state: gate(left(x, state[0]), right(x, state[1]))

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        left, right = self.branches
        a, state_a = left.prefix(tokens)
        b, state_b = right.prefix(tokens)
        return tokens if tokens.is_meta else self.gate(a, b), (state_a, state_b)

    def bound(self, tokens: int) -> None:
        for block in self.branches:
            block.bound(tokens)
        self.grows = any(block.grows for block in self.branches)

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()

    def flops(self, length: int) -> int:
        return sum(block.flops(length) for block in self.branches) + 10 * self.dim * length

    def read_flops(self, length: int) -> int:
        return sum(read_flops(block, length) for block in self.branches) + 10 * self.dim * length
