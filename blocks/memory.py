"""The neural memory block: projections, convolution and gates around the memory operation (paper 4.4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import hardsigmoid

from ..kernels.linear import project
from ..kernels.memory import MemoryState, Options, Tokens, read_memory, titans_memory
from ..kernels.norm_gate import gated_norm
from ..kernels.padding import Layout, align, last
from ..kernels.short_conv import query, query_key_value
from ..kernels.short_conv.decode import Layers, memory_inputs, memory_query
from ..registry import register
from .block import Block, check_call
from .layers import Linear, fuses, gated_output, is_plain
from .observers import Learned, active, observers_of


class NeuralMemoryState(NamedTuple):
    """What a memory block carries from token to token. Every tensor has the batch row first."""

    memory: MemoryState
    """Fast weights, momentum, anchor and position."""
    convolution: Tensor | None
    """``[batch, width - 1, 3 * inner]``: the projected inputs the convolution still needs."""
    gates: Tensor | None
    """``[batch, gates * heads]``: the running chunk's gates, where gates are constant over a chunk."""


@register("memory")
class NeuralMemory(Block):
    """A long-term memory: per head a small network, trained by gradient descent on every token it reads.

    Queries and keys are normalised, gates are learned functions of the input, and the output is normalised,
    gated and projected. ``forward`` writes each token and then reads it back; ``read`` does not write.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: Annotated[int, Field(ge=1, description="independent memories, each of width dim / heads")] = 4,
        depth: Annotated[int, Field(ge=1, le=16, description="layers of the memory network")] = 2,
        expansion: Annotated[
            int, Field(ge=1, le=64, description="hidden width of the network over its input width")
        ] = 4,
        chunk: Annotated[
            int, Field(ge=1, le=65536, description="tokens whose gradients share one anchor; part of the function")
        ] = 16,
        activation: Annotated[
            Literal["identity", "silu", "gelu", "relu"], Field(description="between the network's layers")
        ] = "gelu",
        norm: Annotated[bool, Field(description="M(x) = x + LayerNorm(net(x)) rather than net(x)")] = True,
        conv: Annotated[
            int, Field(ge=0, le=64, description="width of the causal convolution on q, k, v; 0 for none")
        ] = 4,
        momentum: Annotated[bool, Field(description="past surprise carries on (eta)")] = True,
        forgetting: Annotated[bool, Field(description="weights decay (alpha)")] = True,
        gates: Annotated[
            Literal["token", "chunk"],
            Field(description="gates per token, or constant over a chunk (its first token's)"),
        ] = "token",
        gating: Annotated[
            Literal["sigmoid", "hard_sigmoid"],
            Field(description="what makes gates of numbers; hard: linear, cut off at exactly 0 and 1"),
        ] = "sigmoid",
        max_step: Annotated[float, Field(gt=0, description="largest step size theta of a token")] = 0.1,
        clip: Annotated[
            float | None, Field(gt=0, description="largest norm of one token's gradient; null for no bound")
        ] = 1.0,
        threshold: Annotated[
            float | None,
            Field(gt=0, description="tokens of less surprise (gradient norm) neither write nor forget; null: all do"),
        ] = None,
        retrieve: Annotated[
            Literal["after", "before"], Field(description="read a token's query after or before the token is written")
        ] = "after",
        use: Annotated[
            Literal["both", "read", "write"],
            Field(description="write and read; read a frozen memory; or write and output zero"),
        ] = "both",
        learn_momentum: Annotated[bool, Field(description="the initial momentum is learned too (else zero)")] = False,
        keep: Annotated[
            int | None,
            Field(
                ge=1, description="chunks between states kept for backward; null: as few as fit a fixed share of memory"
            ),
        ] = None,
    ) -> None:
        super().__init__(dim)
        self.heads, self.chunk, self.activation, self.clip = heads, chunk, activation, clip
        self.momentum, self.forgetting, self.gates, self.max_step = momentum, forgetting, gates, max_step
        self.conv, self.retrieve, self.use, self.keep = conv, retrieve, use, keep
        self.gating, self.threshold = gating, threshold
        self.period = chunk
        width = dim // heads
        hidden = width * expansion
        widths = [width, *[hidden] * (depth - 1), width]
        self.shapes = [(out, in_) for in_, out in pairwise(widths)]

        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.convolution = nn.Parameter(torch.empty(3 * dim, conv)) if conv else None
        self.controls = Linear(dim, heads * (1 + momentum + forgetting))
        self.initial_weights = nn.ParameterList([torch.empty(heads, *shape) for shape in self.shapes])
        self.initial_momentum = nn.ParameterList(
            [torch.empty(heads, *shape) for shape in self.shapes] if momentum and learn_momentum else []
        )
        self.norm_gain = nn.Parameter(torch.empty(heads, width)) if norm else None
        self.output_gain = nn.Parameter(torch.empty(heads, width))
        self.output_gate = Linear(dim, dim, bias=False)
        self.output = Linear(dim, dim, bias=False)

    @classmethod
    def problems(cls, dim: int | None, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        if dim is not None and dim % fields["heads"]:
            yield "heads", f"{fields['heads']} heads do not divide the width {dim}"
        if fields["learn_momentum"] and not fields["momentum"]:
            yield "learn_momentum", "there is no momentum to learn: momentum is false"

    def reset_parameters(self) -> None:
        """Initialise for a memory that learns at once, keeps what it learned, and does not explode.

        ================  ==========================================================================
        projections       normal, 1 / sqrt(dim): unit-variance input gives unit-variance output
        convolution       the current token passes (last tap about 1), and of the past as much in all: normal,
                          1 / sqrt(taps). From near zero, what belongs to the token before would be learned late
        theta             bias -3: 0.05 of the largest step. Gradients of the outer training pass through every
                          update; from about 0.1 on they grow with the length and overflow by 4,096 tokens
        eta               bias 1: 0.73 of the momentum carries on
        alpha             bias -4 .. -8 over the heads: half-lives of about 40 to 2,000 tokens
        network           normal. Under LayerNorm a step moves the output by step / |output|^2, so the weights start
                          wide: 1 in the first and last layer, 1.5 / sqrt(in) between; else 1 / sqrt(in)
        gains             1
        output            zero-free but small, 0.5 / sqrt(dim): a new layer perturbs the residual stream little
        ================  ==========================================================================

        Hard gates start at the values of the sigmoids above, and as steep: a fresh memory cuts none off.
        """
        scale = self.dim**-0.5
        for linear, std in (
            (self.qkv, scale),
            (self.output_gate, scale),
            (self.output, 0.5 * scale),
            (self.controls, 0.1 * scale),
        ):
            nn.init.normal_(linear.weight, std=std)
        biases = [torch.full((self.heads,), -3.0)]
        if self.momentum:
            biases.append(torch.ones(self.heads))
        if self.forgetting:
            biases.append(torch.linspace(-4, -8, self.heads) if self.heads > 1 else torch.tensor([-6.0]))
        bias = torch.cat(biases)
        if self.gating == "hard_sigmoid":  # its slope is 1 / 6
            open_ = torch.sigmoid(bias)
            bias = 6 * (open_ - 0.5)
            self.controls.weight.mul_((6 * open_ * (1 - open_)).unsqueeze(-1))
        self.controls.bias.copy_(bias)
        if self.convolution is not None:
            nn.init.normal_(self.convolution, std=self.conv**-0.5)
            self.convolution[:, -1] += 1
        layers = len(self.initial_weights)
        for layer, weight in enumerate(self.initial_weights):
            inner_layer = 0 < layer < layers - 1
            wide = 1.5 * weight.shape[-1] ** -0.5 if inner_layer else 1.0
            nn.init.normal_(weight, std=wide if self.norm_gain is not None else weight.shape[-1] ** -0.5)
        for momentum in self.initial_momentum:
            nn.init.normal_(momentum, std=0.02 * momentum.shape[-1] ** -0.5)
        for gain in (self.norm_gain, self.output_gain):
            if gain is not None:
                nn.init.ones_(gain)

    @property
    def state_dtype(self) -> torch.dtype:
        """Fast weights stay float32 (or wider) whatever the model's dtype."""
        return torch.promote_types(self.output_gain.dtype, torch.float32)

    def init_state(self, batch_size: int) -> NeuralMemoryState:
        dtype = self.state_dtype
        weights = tuple([w.to(dtype).expand(batch_size, *w.shape) for w in self.initial_weights])
        learned = tuple([w.to(dtype).expand(batch_size, *w.shape) for w in self.initial_momentum])
        new = self.output_gain.new_zeros
        return NeuralMemoryState(
            MemoryState.fresh(weights, (learned or None) if self.momentum else ()),
            new(batch_size, self.conv - 1, 3 * self.dim) if self.conv else None,
            new(batch_size, self.controls.out_features) if self.gates == "chunk" else None,
        )

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Write each token, then read it back. ``x``: ``[batch, time, dim]`` -> the same shape, and the new state."""
        y, state = self.learn(x, self.init_state(x.shape[0]) if state is None else state, mask=mask)
        if mask is None:
            return self.output_of(y, x), state
        valid = mask.unsqueeze(-1)
        # masked inputs, whatever they are, must not reach gradients either
        return torch.where(valid, self.output_of(y, torch.where(valid, x, 0.0)), 0.0), state

    def read(self, x: Tensor, state: NeuralMemoryState) -> Tensor:
        """Query the memory with each token of ``x`` as if it came next. Writes nothing."""
        check_call(self, x, state)
        if self.one_token(x):
            q = memory_query(x, state.convolution, self.query_layers())
            y = read_memory(q, state.memory.weights, self.activation, self.norm_gain)
            return gated_output(y, self.output_gain, x, self.output_gate, self.output)
        return self.recall(self.ask(x), state)

    def write(self, x: Tensor, state: NeuralMemoryState, mask: Tensor | None = None) -> NeuralMemoryState:
        """Return the state after all tokens of ``x`` were written."""
        return self(x, state, mask=mask)[1]

    def ask(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What ``read`` computes without the state: the query's projection and the output gate."""
        plain = is_plain(self.qkv)
        projected = project(x, self.qkv.weight[: self.dim]) if plain else self.qkv(x)[..., : self.dim]
        return projected, self.output_gate(x)

    def recall(self, query_and_gate: Sequence[Tensor], state: NeuralMemoryState) -> Tensor:
        """``read``, given ``ask(x)``."""
        projected, gate = query_and_gate
        q = query(projected.to(self.output_gain.dtype), self.convolution, state.convolution, self.heads)
        y = read_memory(q, state.memory.weights, self.activation, self.norm_gain)
        y = self.output(gated_norm(y, self.output_gain, gate))
        return y

    def learn(
        self, x: Tensor, state: NeuralMemoryState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """``forward`` up to the operation's outputs ``[batch, time, heads, dim / heads]``."""
        layout = None if mask is None else align(mask)
        if layout is not None:
            x = layout.spread(x)  # valid tokens of each row side by side
        tokens, history, gates = self.inputs(x, state, None if layout is None else layout.length)
        if self.use == "read":
            y, memory = read_memory(tokens.q, state.memory.weights, self.activation, self.norm_gain), None
        else:
            y, memory = titans_memory(
                *tokens, state.memory, self.chunk, self.activation, self.norm_gain,
                None if layout is None else layout.filled,
                clip=self.clip, read=self.retrieve, keep=self.keep, threshold=self.threshold,
            )  # fmt: skip
        if active:
            self.report(tokens, state.memory, memory, layout)
        return y if layout is None else layout.collect(y), NeuralMemoryState(memory or state.memory, history, gates)

    def inputs(
        self, x: Tensor, state: NeuralMemoryState, length: Tensor | None
    ) -> tuple[Tokens, Tensor | None, Tensor | None]:
        """Queries, keys, values and gates of the operation; and the state's next ``convolution`` and ``gates``.

        ``length``: ``[batch]``, the valid tokens at the start of each row; ``None`` for all.
        """
        if length is None and self.one_token(x):
            q, k, v, (theta, *others), history = memory_inputs(x, state.convolution, self.layers())
            gates = None
        else:
            # under autocast, too, what the state keeps is not narrowed
            projected = self.qkv(x).to(self.output_gain.dtype)
            q, k, v, history = query_key_value(projected, self.convolution, state.convolution, self.heads, length)
            if self.use == "read":
                return Tokens(q, k, v, q.new_zeros(q.shape[:3]), None, None), history, state.gates
            raw, gates = self._gate_inputs(x, state, length)
            gate = hardsigmoid if self.gating == "hard_sigmoid" else torch.sigmoid
            theta, *others = gate(raw.to(self.state_dtype)).split(self.heads, dim=-1)
            theta = theta * self.max_step
        eta, alpha = others[0] if self.momentum else None, others[-1] if self.forgetting else None
        return Tokens(q, k, v, theta, eta, alpha), history, gates

    def _gate_inputs(self, x: Tensor, state: NeuralMemoryState, length: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gates before their sigmoid, ``[batch, time, gates * heads]``, and those of the running chunk."""
        raw = self.controls(x).to(self.output_gain.dtype)
        if state.gates is None:
            return raw, None
        # a chunk's gates are those of its first token: causal, and the same however the sequence is cut
        time = torch.arange(x.shape[1], device=x.device)
        first = time - (state.memory.position[:, None] + time) % self.chunk
        index = first.clamp(min=0).unsqueeze(-1).expand_as(raw)
        raw = torch.where((first >= 0).unsqueeze(-1), raw.gather(1, index), state.gates.unsqueeze(1))
        past = torch.cat([state.gates.unsqueeze(1), raw], dim=1)  # without a new token, the last ones stay
        return raw, past[:, -1] if length is None else last(past, length + 1, 1)[:, 0]

    def output_of(self, y: Tensor, x: Tensor) -> Tensor:
        """Normalise the operation's outputs ``y`` per head, gate them by ``x``, project."""
        if self.use == "write":
            return torch.zeros_like(x)
        return gated_output(y, self.output_gain, x, self.output_gate, self.output)

    # -- for decoding and observers --------------------------------------------------------------------------------

    def one_token(self, x: Tensor) -> bool:
        """Whether this is one token per row, without gradients, for which fused kernels run."""
        usual = x.shape[1] == 1 and self.gates == "token" and self.use == "both"
        return usual and is_plain(self.controls) and fuses(x, self.qkv, self.output_gate, self.output)

    def layers(self) -> Layers:
        """The parameters from a token to the operation's inputs, as the fused kernel takes them."""
        controls, hard = self.controls, self.gating == "hard_sigmoid"
        return Layers(
            self.qkv.weight, self.convolution, self.heads, controls.weight, controls.bias, self.max_step, hard
        )

    def query_layers(self) -> Layers:
        """Likewise, for the query alone."""
        return Layers(self.qkv.weight[: self.dim], self.convolution, self.heads)

    def options(self) -> Options:
        return Options(self.chunk, self.activation, self.clip, self.retrieve, self.keep, threshold=self.threshold)

    def report(
        self, tokens: Tokens, before: MemoryState, after: MemoryState | None, layout: Layout | None = None
    ) -> None:
        """Tell observers what was written; without a state ``after`` it, what would have been."""
        for observer in observers_of(self):
            observer.learned(self, Learned(tokens, before, after, self.norm_gain, self.options(), layout))
