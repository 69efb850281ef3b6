"""The neural memory block: projections, convolution and gates around the memory operation (paper 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import hardsigmoid

from ..kernels.dispatch import use_decode_kernel as few
from ..kernels.linear import project
from ..kernels.linear import project_recomputed as project_made
from ..kernels.memory import MemoryState, Options, Tokens, prepare_read, prepare_step, read_memory, titans_memory
from ..kernels.memory.cost import memory_flops
from ..kernels.norm_gate import gated_norm
from ..kernels.norm_gate.decode import gated_output, prepare_gated_output
from ..kernels.padding import Layout, align, last
from ..kernels.short_conv import query, query_key_value
from ..kernels.short_conv.decode import Layers, memory_inputs, memory_query, prepare_inputs
from ..registry import register
from .block import Block, Decoder, check_input, check_kept
from .linear import Linear, plain
from .walking import Walk
from .watching import Learned, watches


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
    gated and projected. ``forward`` writes each token and then reads it back; ``read`` asks without writing.
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
        self.inner = dim
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

    # -- state -----------------------------------------------------------------------------------------------------

    @property
    def state_dtype(self) -> torch.dtype:
        """Fast weights stay float32 (or wider) whatever the model's dtype."""
        return torch.promote_types(self.output_gain.dtype, torch.float32)

    def init_state(self, batch_size: int) -> NeuralMemoryState:
        learned = lambda part: tuple(  # noqa: E731
            w.to(self.state_dtype).expand(batch_size, *w.shape) for w in part
        )
        weights = learned(self.initial_weights)
        if not self.momentum:
            momentum: tuple[Tensor, ...] | None = ()
        else:
            momentum = learned(self.initial_momentum) or None
        new = self.output_gain.new_zeros
        return NeuralMemoryState(
            MemoryState.fresh(weights, momentum),
            new(batch_size, self.conv - 1, 3 * self.inner) if self.conv else None,
            new(batch_size, self.controls.out_features) if self.gates == "chunk" else None,
        )

    # -- the three uses --------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Write each token, then read it back. ``x``: ``[batch, time, dim]`` -> the same shape, and the new state."""
        check_input(self, x, mask, like=self.output_gain)
        if state is None:
            state = self.init_state(x.shape[0])
        else:
            self._check_state(x, state)
        if mask is None and self._decodes(x):
            return self._step(x, state)
        y, state = self._learn(x, state, mask=mask)
        if mask is None:
            return self._finish(y, x), state
        real = mask.unsqueeze(-1)
        # whatever stands at a masked token reaches no gradient either
        return torch.where(real, self._finish(y, torch.where(real, x, 0.0)), 0.0), state

    def read(self, x: Tensor, state: NeuralMemoryState) -> Tensor:
        """What the memory answers to each token of ``x`` on its own, as if it came next; nothing is written."""
        self._check_state(x, state)
        check_input(self, x, None, like=self.output_gain)
        if self._decodes(x):
            q = memory_query(x, state.convolution, self._layers(learns=False))
            y = read_memory(q, state.memory.weights, self.activation, self.norm_gain)
            return gated_output(y, self.output_gain, x, self.output_gate.weight, self.output.weight)
        return self._answer(self._ask(x), state)

    def write(self, x: Tensor, state: NeuralMemoryState, mask: Tensor | None = None) -> NeuralMemoryState:
        """The state after every token of ``x`` was written."""
        return self.forward(x, state, mask=mask)[1]

    def walk(self) -> Walk:
        """``read`` and ``forward`` in halves: see ``walking.walk``."""

        def answer(asked: Sequence[Tensor], state: NeuralMemoryState) -> Tensor:
            self._check_state(asked[0], state)
            return self._answer(asked, state)

        def learn(
            x: Tensor, state: NeuralMemoryState, *, mask: Tensor | None = None
        ) -> tuple[Tensor, NeuralMemoryState]:
            self._check_state(x, state)
            return self._learn(x, state, mask=mask)

        return Walk(self._ask, answer, learn, self._finish)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _decodes(self, x: Tensor) -> bool:
        """Whether this is one token of each row, for which a few kernels do everything: no gradients, no hooks."""
        if x.shape[1] != 1 or self.gates != "token" or self.use != "both":
            return False
        linears = self.qkv, self.controls, self.output_gate, self.output
        return plain(*linears) and few(x, *[linears[i].weight for i in (0, 2, 3)])

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        finish = self._finisher(rows)
        if time != 1 or finish is None:
            return None
        inputs = prepare_inputs(self._layers(), rows)
        if inputs is None:
            return None
        (q, k, v, gates, _), load = inputs
        tokens = Tokens(q, k, v, gates[0], gates[1] if self.momentum else None, gates[-1] if self.forgetting else None)
        write = prepare_step(tokens, self.shapes, self.norm_gain, self._options())
        if write is None:
            return None

        def decode(x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, NeuralMemoryState]:
            if self.use != "both":  # frozen meanwhile
                return self(x, state)
            history = load(x, state.convolution)
            y, memory = write(state.memory)
            self._tell(tokens, state.memory, memory)
            return finish(y, x), NeuralMemoryState(memory, history, None)

        return decode

    def reader(self, rows: int) -> Callable[[Tensor, NeuralMemoryState], Tensor] | None:
        """``read`` for many times one token of each of ``rows`` rows: see ``decoding.reader``."""
        finish = self._finisher(rows)
        inputs = prepare_inputs(self._layers(learns=False), rows)
        if finish is None or inputs is None:
            return None
        (q, *_), load = inputs
        ask = prepare_read(q, self.shapes, self.activation, self.norm_gain)
        if ask is None:
            return None

        def read(x: Tensor, state: NeuralMemoryState) -> Tensor:
            load(x, state.convolution)
            return finish(ask(state.memory.weights), x)

        return read

    def _layers(self, learns: bool = True) -> Layers:
        """What makes the memory's inputs of a token, or its query alone."""
        qkv, controls = self.qkv.weight, self.controls
        if not learns:
            return Layers(qkv[: self.inner], self.convolution, self.heads)
        hard = self.gating == "hard_sigmoid"
        return Layers(qkv, self.convolution, self.heads, controls.weight, controls.bias, self.max_step, hard)

    def _finisher(self, rows: int) -> Callable[[Tensor, Tensor], Tensor] | None:
        """``_finish`` for decoding; ``None`` where there is no preparing it."""
        gate, out = self.output_gate.weight, self.output.weight
        if not self._decodes(gate.new_empty(rows, 1, self.dim)):
            return None
        return prepare_gated_output(self.output_gain, gate, out, (rows, 1))

    def _step(self, x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, NeuralMemoryState]:
        """``forward`` of what :meth:`_decodes`."""
        q, k, v, gates, history = memory_inputs(x, state.convolution, self._layers())
        tokens = Tokens(q, k, v, gates[0], gates[1] if self.momentum else None, gates[-1] if self.forgetting else None)
        y, memory = self._write(tokens, state.memory)
        y = gated_output(y, self.output_gain, x, self.output_gate.weight, self.output.weight)
        return y, NeuralMemoryState(memory, history, None)

    def _ask(self, x: Tensor) -> tuple[Tensor, ...]:
        # the values and keys are not asked for, unless the layer is not what it was made as
        projected = project(x, self.qkv.weight[: self.inner]) if plain(self.qkv) else self.qkv(x)[..., : self.inner]
        return projected, self.output_gate(x)

    def _answer(self, asked: Sequence[Tensor], state: NeuralMemoryState) -> Tensor:
        projected, gate = asked
        q = query(projected.to(self.output_gain.dtype), self.convolution, state.convolution, self.heads)
        y = read_memory(q, state.memory.weights, self.activation, self.norm_gain)
        return self.output(gated_norm(y, self.output_gain, gate))

    def _learn(
        self, x: Tensor, state: NeuralMemoryState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """``forward`` without :meth:`_finish`."""
        if mask is None:
            return self._run(x, state, None)
        layout = align(mask)
        y, state = self._run(layout.spread(x), state, layout)
        return layout.collect(y), state

    def _run(self, x: Tensor, state: NeuralMemoryState, layout: Layout | None) -> tuple[Tensor, NeuralMemoryState]:
        """:meth:`_learn` for rows whose real tokens ``layout`` has put first."""
        length = None if layout is None else layout.length
        # under autocast too, what the state keeps is not narrowed
        q, k, v, history = query_key_value(
            self.qkv(x).to(self.output_gain.dtype), self.convolution, state.convolution, self.heads, length
        )
        if self.use == "read":
            y = read_memory(q, state.memory.weights, self.activation, self.norm_gain)
            if watches(self):
                self._tell(Tokens(q, k, v, q.new_zeros(q.shape[:3]), None, None), state.memory, None, layout)
            return y, state._replace(convolution=history)
        theta, eta, alpha, held = self._controls(x, state, length)
        y, memory = self._write(Tokens(q, k, v, theta, eta, alpha), state.memory, layout)
        return y, NeuralMemoryState(memory, history, held)

    def _write(self, tokens: Tokens, state: MemoryState, layout: Layout | None = None) -> tuple[Tensor, MemoryState]:
        y, after = titans_memory(
            *tokens, state, chunk=self.chunk, activation=self.activation, norm=self.norm_gain,
            mask=None if layout is None else layout.filled, clip=self.clip, read=self.retrieve, keep=self.keep,
            threshold=self.threshold,
        )  # fmt: skip
        self._tell(tokens, state, after, layout)
        return y, after

    def _tell(
        self, tokens: Tokens, before: MemoryState, after: MemoryState | None, layout: Layout | None = None
    ) -> None:
        """What was written, or with no state after it what would have been, to whoever watches."""
        for watch in watches(self):
            watch.learned(self, Learned(tokens, before, after, self.norm_gain, self._options(), layout))

    def _options(self) -> Options:
        return Options(self.chunk, self.activation, self.clip, self.retrieve, self.keep, threshold=self.threshold)

    def _controls(
        self, x: Tensor, state: NeuralMemoryState, length: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Step size, momentum and forgetting ``[batch, time, heads]``, in the state's dtype; and the held gates."""
        raw = self.controls(x).to(self.output_gain.dtype)
        held = state.gates
        if held is not None:
            # a chunk's gates are those of its first token: causal, and the same however the sequence is cut
            position = state.memory.position[:, None] + torch.arange(x.shape[1], device=x.device)
            first = torch.arange(x.shape[1], device=x.device) - position % self.chunk
            index = first.clamp(min=0).unsqueeze(-1).expand_as(raw)
            raw = torch.where((first >= 0).unsqueeze(-1), raw.gather(1, index), held.unsqueeze(1))
            past = torch.cat([held.unsqueeze(1), raw], dim=1)  # where no token came, those held stay
            held = past[:, -1] if length is None else last(past, length + 1, 1)[:, 0]
        parts = (self.heads,) * (raw.shape[-1] // self.heads)
        curve = hardsigmoid if self.gating == "hard_sigmoid" else torch.sigmoid
        split = iter(curve(raw.to(self.state_dtype)).split_with_sizes(parts, dim=-1))
        theta = next(split) * self.max_step
        return theta, next(split) if self.momentum else None, next(split) if self.forgetting else None, held

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        """Normalise per head, gate by the input, project."""
        if self.use == "write":
            return torch.zeros_like(x)
        gain, gate, out = self.output_gain, self.output_gate, self.output
        # an adapter or a hook in a layer's place has to be called
        if plain(gate, out) and few(x, gate.weight, out.weight):
            return gated_output(y, gain, x, gate.weight, out.weight)
        if plain(out):
            return project_made(gated_norm, out.weight, y, gain, gate(x))
        return out(gated_norm(y, gain, gate(x)))

    def _check_state(self, x: Tensor, state: NeuralMemoryState) -> None:
        if not isinstance(state, NeuralMemoryState):
            raise TypeError(
                f"memory: state: expected a NeuralMemoryState (init_state makes one), got {type(state).__name__}"
            )
        if state.memory.position.shape[0] != x.shape[0]:
            raise ValueError(f"memory: state has {state.memory.position.shape[0]} rows: expected x's {x.shape[0]}")
        rows, inner, dtype = x.shape[0], 3 * self.inner, self.output_gain.dtype
        weights, momentum, anchor, _ = state.memory
        for name, part in (("weights", weights), ("momentum", momentum), ("anchor", anchor)):
            layers = 0 if name == "momentum" and not self.momentum else len(self.shapes)
            if len(part) != layers:
                raise ValueError(
                    f"NeuralMemory: the state is of another block: memory.{name} has {len(part)} layers, "
                    f"expected {layers}"
                )
            for layer, (tensor, shape) in enumerate(zip(part, self.shapes)):
                check_kept(self, f"memory.{name}.{layer}", tensor, (rows, self.heads, *shape), self.state_dtype)
        past = (rows, self.conv - 1, inner) if self.conv else None
        check_kept(self, "convolution", state.convolution, past, dtype)
        held = (rows, self.controls.out_features) if self.gates == "chunk" else None
        check_kept(self, "gates", state.gates, held, dtype)

    def read_flops(self, length: int) -> int:
        """FLOPs of ``read`` for ``length`` tokens: the query's projection, the network, gate and output."""
        weights = sum(out * width for out, width in self.shapes)
        return length * 2 * (3 * self.output.weight.numel() + self.heads * weights)

    def flops(self, length: int) -> int:
        projections = 2 * (self.qkv.weight.numel() + self.controls.weight.numel() + 2 * self.output.weight.numel())
        convolution = 2 * 3 * self.inner * self.conv
        if self.use == "read":
            memory = 2 * sum(out * width for out, width in self.shapes)
        else:
            memory = memory_flops(self.shapes, min(self.chunk, length), self.momentum)
        return length * (projections + convolution + self.heads * memory)
