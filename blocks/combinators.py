"""Blocks that contain blocks: ``chain``, ``residual``, ``gate``, ``persistent``, and the layer of a model.

A combinator of memories is a memory itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ..kernels.documents import Documents
from ..registry import Spec, create, register
from .block import Block, Blocks, as_memory, as_rows
from .layers import Form, Gating, RMSNorm
from .observers import active, observers_of
from .segmented import forward_every
from .state import State


@register("chain")
class Chain(Block):
    """A sequence of blocks, ``x -> f(x) -> g(f(x)) -> ...``. In a recipe, a list of blocks is a chain.

    It has no normalization and no residual connections of its own. A chain of memories is read in sequence too: the
    output of each memory is the query of the next. State: a tuple of the states of the blocks.
    """

    delegates = ("of",)
    sharding = "local"

    def __init__(
        self, dim: int, *, of: Annotated[list[Spec], Field(min_length=1, description="the blocks in order")]
    ) -> None:
        super().__init__(dim)
        self.of = Blocks(create(spec, dim=dim) for spec in of)

    def init_state(self, batch_size: int) -> State:
        return tuple(block.init_state(batch_size) for block in self.of)

    def forward(
        self, x: Tensor, state: State = None, *, mask: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, State]:
        none, states = [None] * len(self.of), []
        for block, before, inside in zip(self.of, state or none, documents.parts(len(none)) if documents else none):
            x, after = block(x, before, mask=mask, documents=inside)
            states.append(after)
        return x, tuple(states)

    def read(self, x: Tensor, state: State) -> Tensor:
        for block, before in zip(self.of, state):
            x = as_memory(block).read(x, before)
        return x

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        return self(x, state, mask=mask)[1]

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        """The outputs of each block at the persistent tokens are the persistent tokens of the next block."""
        states = []
        for block in self.of:
            tokens, state = block.prefix(tokens)
            states.append(state)
        return tokens, tuple(states)


@register("residual")
class Residual(Block):
    """Residual connection, ``x + f(x)``.

    A layer of a model has a residual connection around each of its blocks. This block is for blocks inside other
    blocks, such as ``attend`` of ``context``: the memory then stores the sum of each token and its attention output.
    State: that of ``of``.
    """

    delegates = ("of",)
    sharding = "local"

    def __init__(self, dim: int, *, of: Annotated[Spec, Field(description="the block inside the connection")]) -> None:
        super().__init__(dim)
        self.of = create(of, dim=dim)

    def init_state(self, batch_size: int) -> State:
        return self.of.init_state(batch_size)

    def forward(
        self, x: Tensor, state: State = None, *, mask: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, State]:
        if documents is None:  # of which a subclass may know nothing
            return self.every(x, state, step=1, mask=mask)
        return self.every(x, state, step=1, mask=mask, documents=documents)

    def every(
        self,
        x: Tensor,
        state: State = None,
        *,
        step: int,
        mask: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, State]:
        """``forward``, with the outputs at every ``step``-th token only."""
        y, state = forward_every(self.of, x, state, step=step, mask=mask, documents=documents)
        x = x[:, step - 1 :: step]
        return y + (x if mask is None else torch.where(mask[:, step - 1 :: step, None], x, 0.0)), state

    def read(self, x: Tensor, state: State) -> Tensor:
        return x + as_memory(self.of).read(x, state)

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        return as_memory(self.of).write(x, state, mask)

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        y, state = self.of.prefix(tokens)
        return tokens + y, state


@register("gate")
class Gate(Block):
    """Parallel branches, of which the others gate the first: ``norm(a(x)) * sigmoid(norm(b(x)))``.

    With attention and a memory as branches, inside ``persistent``, this is memory as gate (equations 26-28). Each
    further branch is a further factor, or a summand. State: a tuple of the states of the branches.
    """

    delegates = ("branches",)
    sharding = "local"

    def __init__(
        self,
        dim: int,
        *,
        branches: Annotated[list[Spec], Field(min_length=2, max_length=26, description="the branches a, b, ...")],
        form: Annotated[
            Form,
            Field(
                description="sigmoid: norm(a) * sigmoid(norm(b)); silu: norm(a) * silu(norm(b)); sum: norm(a) + norm(b)"
            ),
        ] = "sigmoid",
    ) -> None:
        super().__init__(dim)
        self.branches = Blocks(create(spec, dim=dim) for spec in branches)
        self.gate = Gating(dim, form, len(branches))

    def init_state(self, batch_size: int) -> State:
        return tuple(block.init_state(batch_size) for block in self.branches)

    def forward(
        self, x: Tensor, state: State = None, *, mask: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, State]:
        outputs, states, none = [], [], [None] * len(self.branches)
        for block, before, inside in zip(
            self.branches, state or none, documents.parts(len(none)) if documents else none
        ):
            y, after = block(x, before, mask=mask, documents=inside)
            outputs.append(y)
            states.append(after)
        self.observe(outputs, mask)
        return self.gate(*outputs), tuple(states)

    def observe(self, outputs: Sequence[Tensor], mask: Tensor | None) -> None:
        """Report the outputs of the branches to active observers."""
        for observer in observers_of(self) if active else ():
            a, *others = outputs
            b = others[0] if len(others) == 1 else torch.cat(others, dim=-1)
            observer.gated(self, self.gate.gate_values(*others), a, b, mask)

    def read(self, x: Tensor, state: State) -> Tensor:
        return self.gate(*(as_memory(block).read(x, before) for block, before in zip(self.branches, state)))

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        return self(x, state, mask=mask)[1]

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        outputs, states = zip(*(block.prefix(tokens) for block in self.branches))
        return tokens if tokens.is_meta else self.gate(*outputs), states


@register("persistent")
class Persistent(Block):
    """Learned tokens before the sequence, ``[P | x]``, with outputs at ``x`` only (equation 19).

    They are processed once, by ``init_state``: a memory writes them, and attention keeps them visible to every later
    token, even beyond its window. State: that of ``of``.
    """

    delegates = ("of",)
    sharding = "local"

    def __init__(
        self,
        dim: int,
        *,
        tokens: Annotated[int, Field(ge=1, le=2**16, description="number of learned tokens before the sequence")] = 16,
        of: Annotated[Spec, Field(description="the block inside")],
    ) -> None:
        super().__init__(dim)
        self.of = create(of, dim=dim)
        self.tokens = nn.Parameter(torch.empty(tokens, dim))

    def init_state(self, batch_size: int) -> State:
        # all rows start from the same state: it is computed once
        return as_rows(self.of.prefix(self.tokens.unsqueeze(0))[1], batch_size)

    def forward(
        self, x: Tensor, state: State = None, *, mask: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, State]:
        if documents is not None:
            # documents of rows without a state begin, too
            documents = documents if documents.fresh is not None else documents.starting(self.init_state(1))
            return self.of(x, state, mask=mask, documents=documents)
        return self.of(x, self.init_state(x.shape[0]) if state is None else state, mask=mask)

    def read(self, x: Tensor, state: State) -> Tensor:
        return as_memory(self.of).read(x, state)

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        return as_memory(self.of).write(x, state, mask)

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        """The given tokens come before the tokens of this block."""
        rows, given, _ = tokens.shape
        y, state = self.of.prefix(torch.cat([tokens, self.tokens.expand(rows, -1, -1)], dim=1))
        return y[:, :given], state

    def reset_parameters(self) -> None:
        nn.init.normal_(self.tokens, std=0.02)


class Layer(Block):
    """``x = x + block(norm(x))`` for each block of a list. State: a tuple of the blocks' states."""

    sharding = "local"

    def __init__(self, dim: int, *, of: Sequence[Spec]) -> None:
        super().__init__(dim)
        self.norms = Blocks(RMSNorm(dim) for _ in of)
        self.blocks = Blocks(create(spec, dim=dim) for spec in of)

    def init_state(self, batch_size: int) -> State:
        return tuple(block.init_state(batch_size) for block in self.blocks)

    def forward(
        self, x: Tensor, state: State = None, *, mask: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, State]:
        if mask is not None:
            # otherwise the residual connection would pass masked inputs to the outputs
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        none, states = [None] * len(self.blocks), []
        parts = documents.parts(len(none)) if documents else none
        for norm, block, before, inside in zip(self.norms, self.blocks, state or none, parts):
            y, after = block(norm(x)[0], before, mask=mask, documents=inside)
            x = x + y
            states.append(after)
        return x, tuple(states)
