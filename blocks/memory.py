"""The neural memory block: projections, convolution and gates around the memory operation (paper 4.4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import hardsigmoid

from ..kernels.linear import SmallLinear, fuses, is_plain, linear, linear_of, project
from ..kernels.memory import MemoryState, Options, Tokens, read_memory, titans_memory
from ..kernels.norm_gate import decode, gated_norm
from ..kernels.padding import Layout, align, last
from ..kernels.short_conv import query, query_key_value
from ..kernels.short_conv.decode import Layers, memory_inputs, memory_query
from ..registry import SameFunction, register
from .block import Block, check_call
from .observers import Learned, active, observers_of


class NeuralMemoryState(NamedTuple):
    """The state of a memory block."""

    memory: MemoryState
    """Fast weights, momentum, anchor and position."""
    convolution: Tensor | None
    """``[batch, conv - 1, 3 * dim]``: the last inputs of the convolution; ``None`` without a convolution."""
    gates: Tensor | None
    """``[batch, gates * heads]``: the gates of the current chunk; ``None`` unless gates are constant over a chunk."""


@register("memory")
class NeuralMemory(Block):
    """Neural long-term memory: a small network per head, trained by gradient descent on each token (section 3).

    Each token has a query, a key and a value. Writing takes a gradient step on ``|M(k) - v|^2``, with momentum and
    weight decay, whose rates are learned functions of the token. Reading returns ``M(q)``, normalized, gated and
    projected. ``forward`` writes and reads each token, ``read`` only reads. State: the weights of the networks.

    ``NeuralMemory(dim=64)`` is a module with initialized parameters. Raises ``ValueError`` for heads that do not divide
    ``dim``.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: Annotated[int, Field(ge=1, description="number of heads, each a memory of width dim / heads")] = 4,
        depth: Annotated[int, Field(ge=1, le=16, description="number of layers of the memory network")] = 2,
        expansion: Annotated[
            int, Field(ge=1, le=64, description="hidden width of the memory network relative to its input")
        ] = 4,
        chunk: Annotated[
            int,
            Field(
                ge=1,
                le=65536,
                description="tokens whose gradients are taken at the weights at the start of the chunk; "
                "part of the function",
            ),
        ] = 16,
        activation: Annotated[
            Literal["identity", "silu", "gelu", "relu"], Field(description="activation of the memory network")
        ] = "gelu",
        norm: Annotated[bool, Field(description="M(x) = x + LayerNorm(net(x)) rather than net(x)")] = True,
        conv: Annotated[
            int, Field(ge=0, le=64, description="width of the causal convolution on q, k, v; 0 for none")
        ] = 4,
        momentum: Annotated[bool, Field(description="momentum with decay eta")] = True,
        forgetting: Annotated[bool, Field(description="weight decay: weights decay by 1 - alpha per token")] = True,
        gates: Annotated[
            Literal["token", "chunk"],
            Field(description="gates of each token, or those of the first token for the whole chunk"),
        ] = "token",
        gating: Annotated[
            Literal["sigmoid", "hard_sigmoid"],
            Field(description="activation of the gates; hard_sigmoid is linear and clamps to exactly 0 and 1"),
        ] = "sigmoid",
        max_step: Annotated[float, Field(gt=0, description="maximum of the step size theta")] = 0.1,
        clip: Annotated[
            float | None, Field(gt=0, description="maximum gradient norm of one token; null for no clipping")
        ] = 1.0,
        threshold: Annotated[
            float | None,
            Field(gt=0, description="tokens with a smaller gradient norm neither write nor decay; null for none"),
        ] = None,
        retrieve: Annotated[
            Literal["after", "before"], Field(description="read each token after or before it is written")
        ] = "after",
        use: Annotated[
            Literal["both", "read", "write"],
            Field(description="write and read; read only (frozen); or write only, with outputs of zero"),
        ] = "both",
        learn_momentum: Annotated[bool, Field(description="learn the initial momentum; zero otherwise")] = False,
        keep: Annotated[
            int | None,
            SameFunction(),
            Field(
                ge=1, description="chunks between the states kept for backward; null to choose by the memory they need"
            ),
        ] = None,
    ) -> None:
        super().__init__(dim)
        for field, problem in self.problems(
            dim, {"heads": heads, "momentum": momentum, "learn_momentum": learn_momentum}
        ):
            raise ValueError(f"{field}: {problem}")
        self.heads, self.chunk, self.activation, self.clip = heads, chunk, activation, clip
        self.momentum, self.forgetting, self.gates, self.max_step = momentum, forgetting, gates, max_step
        self.conv, self.retrieve, self.use, self.keep = conv, retrieve, use, keep
        self.gating, self.threshold = gating, threshold
        self.period = chunk
        width = dim // heads
        hidden = width * expansion
        widths = [width, *[hidden] * (depth - 1), width]
        self.shapes = [(out, in_) for in_, out in pairwise(widths)]

        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.convolution = nn.Parameter(torch.empty(3 * dim, conv)) if conv else None
        self.controls = SmallLinear(dim, heads * (1 + momentum + forgetting))
        self.initial_weights = nn.ParameterList([torch.empty(heads, *shape) for shape in self.shapes])
        self.initial_momentum = nn.ParameterList(
            [torch.empty(heads, *shape) for shape in self.shapes] if momentum and learn_momentum else []
        )
        self.norm_gain = nn.Parameter(torch.empty(heads, width)) if norm else None
        self.output_gain = nn.Parameter(torch.empty(heads, width))
        self.output_gate = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        if not self.output_gain.is_meta:
            with torch.no_grad():
                self.reset_parameters()

    @classmethod
    def problems(cls, dim: int | None, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        if dim is not None and dim % fields["heads"]:
            yield "heads", f"{fields['heads']} heads do not divide the width {dim}"
        if fields["learn_momentum"] and not fields["momentum"]:
            yield "learn_momentum", "there is no momentum to learn: momentum is false"

    def reset_parameters(self) -> None:
        """Initialize all parameters.

        ================  ==========================================================================
        projections       normal, std 1 / sqrt(dim): inputs of unit variance give outputs of unit variance
        convolution       normal, std 1 / sqrt(taps), plus 1 at the current token. With taps near zero, training takes
                          long to use the previous token
        theta             bias -3: 0.05 of max_step. Gradients of the outer training pass through every update;
                          from about 0.1 on they grow with the length and overflow by 4,096 tokens
        eta               bias 1: a momentum decay of 0.73
        alpha             bias -4 to -8 over the heads: half-lives of about 40 to 2,000 tokens
        network           normal, std 1 / sqrt(in). Under LayerNorm, a step moves the output by step / |output|^2, so
                          the std is larger: 1 in the first and last layer, 1.5 / sqrt(in) in the others
        gains             1
        output            normal, std 0.5 / sqrt(dim): small, so that a new layer changes the residual stream little
        ================  ==========================================================================

        With ``hard_sigmoid``, values and slopes at initialization equal those of the sigmoid, so that no gate
        saturates.
        """
        scale = self.dim**-0.5
        for projection, std in (
            (self.qkv, scale),
            (self.output_gate, scale),
            (self.output, 0.5 * scale),
            (self.controls, 0.1 * scale),
        ):
            nn.init.normal_(projection.weight, std=std)
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

    def init_state(self, batch_size: int) -> NeuralMemoryState:
        # the fast weights are of the parameters' dtype, but at least float32
        new, dtype = self.output_gain.new_zeros, torch.promote_types(self.output_gain.dtype, torch.float32)
        weights, momentum = [], []
        # copies, because the optimizer changes parameters in place, and FSDP frees their memory
        for weight in self.initial_weights:
            weights.append(weight.to(dtype, copy=True).expand(batch_size, *weight.shape))
        for weight in self.initial_momentum:
            momentum.append(weight.to(dtype, copy=True).expand(batch_size, *weight.shape))
        if self.momentum and not momentum:
            for weight in weights:
                momentum.append(weight.new_zeros(weight.shape))
        return NeuralMemoryState(
            MemoryState(tuple(weights), tuple(momentum), tuple(weights), new(batch_size, dtype=torch.int64)),
            new(batch_size, self.conv - 1, 3 * self.dim) if self.conv else None,
            new(batch_size, self.heads * (1 + self.momentum + self.forgetting)) if self.gates == "chunk" else None,
        )

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Write and read each token. ``x``: ``[batch, time, dim]`` -> outputs of the same shape, and the new state."""
        y, state = self.learn(x, self.init_state(x.shape[0]) if state is None else state, mask=mask)
        if mask is None:
            return self.output_of(y, x), state
        valid = mask.unsqueeze(-1)
        # masked inputs may be NaN, which must not reach gradients
        return torch.where(valid, self.output_of(y, torch.where(valid, x, 0.0)), 0.0), state

    def read(self, x: Tensor, state: NeuralMemoryState) -> Tensor:
        """Query the memory with each token of ``x`` [batch, time, dim] as if it came next. Does not write."""
        check_call(self, x, state)
        if self.one_token(x):
            q = memory_query(x, state.convolution, self.query_layers())
            y = read_memory(q, state.memory.weights, self.activation, self.norm_gain)
            return decode.gated_output(y, self.output_gain, x, self.output_gate.weight, self.output.weight)
        return self.recall(self.ask(x), state)

    def write(self, x: Tensor, state: NeuralMemoryState, mask: Tensor | None = None) -> NeuralMemoryState:
        """Return the state after all tokens of ``x`` are written."""
        return self(x, state, mask=mask)[1]

    def ask(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the part of ``read`` that does not depend on the state: projected queries and the output gate."""
        plain = is_plain(self.qkv)
        projected = project(x, self.qkv.weight[: self.dim]) if plain else linear(self.qkv, x)[..., : self.dim]
        return projected, linear(self.output_gate, x)

    def recall(self, query_and_gate: Sequence[Tensor], state: NeuralMemoryState) -> Tensor:
        """Compute ``read`` from the result of ``ask(x)``."""
        projected, gate = query_and_gate
        q = query(projected.to(self.output_gain.dtype), self.convolution, state.convolution, self.heads)
        y = read_memory(q, state.memory.weights, self.activation, self.norm_gain)
        y = linear(self.output, gated_norm(y, self.output_gain, gate))
        return y

    def learn(
        self, x: Tensor, state: NeuralMemoryState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Compute ``forward`` up to the outputs of the operation, ``[batch, time, heads, dim / heads]``."""
        layout = None if mask is None else align(mask)
        if layout is not None:
            x = layout.spread(x)  # the valid tokens of each row first
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
        """Return the inputs of the operation, and the fields ``convolution`` and ``gates`` of the next state.

        ``length``: ``[batch]``, the number of valid tokens at the start of each row; ``None`` if all are valid.
        """
        if length is None and x.shape[1] == 1 and self.one_token(x):
            q, k, v, (theta, *others), history = memory_inputs(x, state.convolution, self.layers())
            gates = None
        else:
            # under autocast, the state keeps its dtype
            projected = linear(self.qkv, x).to(self.output_gain.dtype)
            q, k, v, history = query_key_value(projected, self.convolution, state.convolution, self.heads, length)
            if self.use == "read":
                return Tokens(q, k, v, q.new_zeros(q.shape[:3]), None, None), history, state.gates
            raw, gates = linear(self.controls, x).to(projected.dtype), state.gates
            if gates is not None:
                raw, gates = self._gates_of_chunks(raw, gates, state.memory.position, length)
            gate = hardsigmoid if self.gating == "hard_sigmoid" else torch.sigmoid
            theta, *others = gate(raw.to(state.memory.weights[0].dtype)).split(self.heads, dim=-1)
            theta = theta * self.max_step
        eta, alpha = others[0] if self.momentum else None, others[-1] if self.forgetting else None
        return Tokens(q, k, v, theta, eta, alpha), history, gates

    def _gates_of_chunks(
        self, raw: Tensor, gates: Tensor, position: Tensor, length: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return each token's gates as those of the first token of its chunk, and those of the current chunk.

        ``raw``: gates before the sigmoid, ``[batch, time, gates * heads]``. ``gates``: those of the chunk before.
        """
        # causal, and independent of how the sequence is split
        time = torch.arange(raw.shape[1], device=raw.device)
        first = time - (position[:, None] + time) % self.chunk
        index = first.clamp(min=0).unsqueeze(-1).expand_as(raw)
        raw = torch.where((first >= 0).unsqueeze(-1), raw.gather(1, index), gates.unsqueeze(1))
        past = torch.cat([gates.unsqueeze(1), raw], dim=1)  # those of the state, if there is no new token
        return raw, past[:, -1] if length is None else last(past, length + 1, 1)[:, 0]

    def output_of(self, y: Tensor, x: Tensor) -> Tensor:
        """Normalize the outputs ``y`` of the operation per head, gate them by ``x`` and project them."""
        if self.use == "write":
            return torch.zeros_like(x)
        if fuses(x, self.output_gate, self.output):
            return decode.gated_output(y, self.output_gain, x, self.output_gate.weight, self.output.weight)
        return linear_of(self.output, gated_norm, y, self.output_gain, linear(self.output_gate, x))

    # -- for decoding and observers --------------------------------------------------------------------------------

    def one_token(self, x: Tensor) -> bool:
        """Whether fused kernels run for ``x``: one token per row, no gradients, and layers that are not modified."""
        usual = x.shape[1] == 1 and self.gates == "token" and self.use == "both"
        return usual and is_plain(self.controls) and fuses(x, self.qkv, self.output_gate, self.output)

    def layers(self) -> Layers:
        """Return the parameters of the fused kernel that computes the inputs of the operation."""
        controls, hard = self.controls, self.gating == "hard_sigmoid"
        return Layers(
            self.qkv.weight, self.convolution, self.heads, controls.weight, controls.bias, self.max_step, hard
        )

    def query_layers(self) -> Layers:
        """Return the parameters of the fused kernel that computes queries only."""
        return Layers(self.qkv.weight[: self.dim], self.convolution, self.heads)

    def options(self) -> Options:
        return Options(self.chunk, self.activation, self.clip, self.retrieve, self.keep, threshold=self.threshold)

    def report(
        self, tokens: Tokens, before: MemoryState, after: MemoryState | None, layout: Layout | None = None
    ) -> None:
        """Report a call of the operation to the observers. ``after`` is ``None`` if the memory is frozen."""
        for observer in observers_of(self):
            observer.learned(self, Learned(tokens, before, after, self.norm_gain, self.options(), layout))
