"""Self-modifying Titans: learners that make the keys, values and gates that they are written with (HOPE)."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from ..kernels.linear import linear, linear_of
from ..kernels.memory.self_modifying import MEMORY, Matrices, apply, self_modify
from ..kernels.norm_gate import gated_norm, l2_norm
from ..kernels.padding import align
from ..registry import SameWeights, register
from .block import Block, check_call
from .memory_rule import convolved


class SelfModifyingState(NamedTuple):
    """The state of a block of self-modifying Titans."""

    weights: Tensor
    """``[batch, 5, heads, width, width]``: the learners of keys, values, step sizes and decays, and the memory."""
    anchor: Tensor
    """The same at the start of the current chunk."""
    position: Tensor
    """``[batch]`` int64: tokens read so far by each row."""
    convolution: Tensor | None
    """``[batch, conv - 1, 2 * dim]``: the last inputs of the convolution; ``None`` without one."""


@register("self_modifying")
class SelfModifyingTitans(Block):
    """Self-modifying Titans with matrices as learners (HOPE, arXiv 2512.24695, eq. 83-93).

        k_t = A_k x_t        v_t = A_v x_t        eta_t = A_eta x_t        alpha_t = A_alpha x_t
        M_t = M_{t-1} (alpha_t I - eta_t k_t k_t^T) - eta_t (A k_t - A v_t) k_t^T        y_t = A_memory q_t

    The second line is that of each of the five learners ``M``, and ``A`` is ``M`` at the start of the chunk: the
    memory, and what makes its keys, values and gates, write values of their own. Inputs ``x_t``, queries, keys and the
    values ``A v_t`` have unit length. State: the matrices.
    """

    sharding = "pipelined"

    def __init__(
        self,
        dim: int,
        *,
        heads: Annotated[int, Field(ge=1, description="number of heads, each of width dim / heads")] = 4,
        chunk: Annotated[
            int, SameWeights(), Field(ge=1, le=65536, description="tokens that are read at the weights before them")
        ] = 16,
        conv: Annotated[int, Field(ge=0, le=64, description="width of the causal convolution; 0: none")] = 4,
        max_step: Annotated[float, SameWeights(), Field(gt=0, description="maximum of the step size eta")] = 0.5,
    ) -> None:
        super().__init__(dim)
        if dim % heads:
            raise ValueError(f"heads: {heads} heads do not divide the width {dim}")
        self.heads, self.chunk, self.conv, self.max_step, self.period = heads, chunk, conv, max_step, chunk
        width = dim // heads
        self.inputs = nn.Linear(dim, 2 * dim, bias=False)
        self.convolution = nn.Parameter(torch.empty(2 * dim, conv)) if conv else None
        self.initial_weights = nn.ParameterList([torch.empty(heads, width, width) for _ in range(5)])
        self.gates = nn.Parameter(torch.empty(2, heads, width))
        self.gate_bias = nn.Parameter(torch.empty(2, heads))
        self.output_gain = nn.Parameter(torch.empty(heads, width))
        self.output_gate = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        if not self.output_gain.is_meta:
            with torch.no_grad():
                self.reset_parameters()

    @classmethod
    def problems(cls, dim: int | None, fields: dict[str, int]) -> list[tuple[str, str]]:
        heads = fields["heads"]
        return [("heads", f"{heads} heads do not divide the width {dim}")] if dim and dim % heads else []

    def reset_parameters(self) -> None:
        """Initialize as ``memory`` does; steps begin at a quarter of their maximum."""
        for layer, std in ((self.inputs, 1.0), (self.output_gate, 1.0), (self.output, 0.5)):
            nn.init.normal_(layer.weight, std=std * self.dim**-0.5)
        if self.convolution is not None:
            nn.init.normal_(self.convolution, std=self.conv**-0.5)
            self.convolution[:, -1] += 1
        for weight in self.initial_weights:
            nn.init.normal_(weight, std=(self.dim // self.heads) ** -0.5)
        nn.init.normal_(self.gates, std=0.5)
        self.gate_bias[0] = -1.1
        self.gate_bias[1] = torch.linspace(4, 8, self.heads) if self.heads > 1 else 6.0
        nn.init.ones_(self.output_gain)

    def init_state(self, batch_size: int) -> SelfModifyingState:
        dtype = torch.promote_types(self.output_gain.dtype, torch.float32)
        initial = torch.stack(list(self.initial_weights)).to(dtype)
        weights = initial.expand(batch_size, *initial.shape)
        position = torch.zeros(batch_size, dtype=torch.int64, device=weights.device)
        before = self.output_gain.new_zeros(batch_size, self.conv - 1, 2 * self.dim) if self.conv else None
        return SelfModifyingState(weights, weights, position, before)

    def forward(
        self, x: Tensor, state: SelfModifyingState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, SelfModifyingState]:
        state = self.init_state(x.shape[0]) if state is None else state
        layout = None if mask is None else align(mask)
        given = x if layout is None else layout.spread(x)
        q, keys, history = self._project(given, state, None if layout is None else layout.length)
        y, state = self._chunks(q, keys, state, None if layout is None else layout.filled)
        state = state._replace(convolution=history)
        if mask is None or layout is None:
            return self._output(y, x), state
        valid = mask.unsqueeze(-1)
        # masked inputs may be NaN, which must not reach gradients
        return torch.where(valid, self._output(layout.collect(y), torch.where(valid, x, 0.0)), 0.0), state

    def write(self, x: Tensor, state: SelfModifyingState, mask: Tensor | None = None) -> SelfModifyingState:
        """Return the state after all tokens of ``x`` are written."""
        return self(x, state, mask=mask)[1]

    def read(self, x: Tensor, state: SelfModifyingState) -> Tensor:
        """Query the memory with each token of ``x`` [batch, time, dim] as if it came next. Does not write."""
        check_call(self, x, state)
        if self.convolution is None or state.convolution is None:
            q = self._project(x, state, None)[0]
        else:  # each token with the history before all of them
            projected = linear(self.inputs, x).to(self.output_gain.dtype)[..., : self.dim]
            taps, past = self.convolution[: self.dim], state.convolution[..., : self.dim]
            before = torch.einsum("btc,ct->bc", past, taps[:, :-1]).unsqueeze(1)
            q = self._unit(silu(before + projected * taps[:, -1]))
        return self._output(apply(state.anchor[:, MEMORY], q), x)

    def _project(self, x: Tensor, state: SelfModifyingState, length: Tensor | None) -> tuple[Tensor, ...]:
        """Queries and inputs of the learners, ``[batch, time, heads, width]``, and the next convolution's history."""
        projected = linear(self.inputs, x).to(self.output_gain.dtype)
        projected, history = convolved(projected, self.convolution, state.convolution, length)
        q, x = self._unit(silu(projected)).split(self.heads, dim=2)
        return q, x, history  # type: ignore[return-value]

    def _unit(self, x: Tensor) -> Tensor:
        return l2_norm(x.unflatten(-1, (-1, self.dim // self.heads)))

    def _chunks(
        self, q: Tensor, x: Tensor, state: SelfModifyingState, valid: Tensor | None
    ) -> tuple[Tensor, SelfModifyingState]:
        matrices = Matrices(state.weights, state.anchor, state.position)
        y, matrices = self_modify(q, x, matrices, valid, self.gates, self.gate_bias, self.chunk, self.max_step)
        return y, state._replace(**matrices._asdict())

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        """Normalize the outputs ``y`` per head, gate them by ``x`` and project them."""
        return linear_of(self.output, gated_norm, y.to(x.dtype), self.output_gain, linear(self.output_gate, x))
