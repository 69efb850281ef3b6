"""The neural memory block: projections, convolution and gates around the memory operation (paper 4.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import hardsigmoid, pad

from ..kernels.dispatch import known
from ..kernels.documents import Documents
from ..kernels.linear import SmallLinear, fuses, is_plain, linear, linear_of, project
from ..kernels.memory import LearnerState, MemoryState, Tokens, read_memory, titans_memory
from ..kernels.norm_gate import decode, gated_norm
from ..kernels.padding import Layout, align
from ..kernels.short_conv import query, query_key_value
from ..registry import register
from . import memory_decode, memory_rule
from . import memory_fields as fields
from .block import Block, check_call
from .documents import run_documents
from .memory_initialization import initialize_memory
from .observers import active, report_learned
from .state import select


class NeuralMemoryState(NamedTuple):
    """The state of a memory block."""

    memory: MemoryState | LearnerState
    """Fast weights, momentum, anchor and position, and what else the rule needs."""
    convolution: Tensor | None
    """``[batch, conv - 1, (1 + 2 * keys) * dim]``: the last inputs of the convolution; ``None`` without one."""
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

    sharding = "pipelined"

    def __init__(
        self,
        dim: int,
        *,
        heads: fields.Heads = 4,
        depth: fields.Depth = 2,
        expansion: fields.Expansion = 4,
        chunk: fields.Chunk = 16,
        activation: fields.Activation = "gelu",
        norm: fields.Norm = True,
        conv: fields.Conv = 4,
        momentum: fields.Momentum = True,
        forgetting: fields.Forgetting = True,
        gates: fields.Gates = "token",
        gating: fields.Gating = "sigmoid",
        max_step: fields.MaxStep = 0.1,
        clip: fields.Clip = 1.0,
        network: fields.Network = "mlp",
        objective: fields.Objective = "l2",
        optimizer: fields.Optimizer = None,
        retention: fields.Retention = None,
        window: fields.Window = 1,
        features: fields.Features = None,
        keys: fields.Keys = 1,
        reset: fields.Reset = None,
        query: fields.Query = None,
        steps: fields.Steps = "one",
        threshold: fields.Threshold = None,
        retrieve: fields.Retrieve = "after",
        read: fields.Read = None,
        use: fields.Use = "both",
        learn_momentum: fields.LearnMomentum = False,
        keep: fields.Keep = None,
    ) -> None:
        super().__init__(dim)
        given = {name: value for name, value in locals().items() if name not in ("self", "dim", "__class__")}
        for field, problem in self.problems(dim, given):
            raise ValueError(f"{field}: {problem}")
        rule, given = memory_rule.rule_of(given), memory_rule.resolve(given)
        momentum, forgetting, retrieve = given["momentum"], given["forgetting"], given["retrieve"]
        self.heads, self.chunk, self.activation, self.conv = heads, chunk, activation, conv
        self.momentum, self.forgetting, self.gates, self.gating = momentum, forgetting, gates, gating
        self.max_step, self.clip, self.threshold = max_step, clip, threshold
        self.retrieve, self.use, self.keep = retrieve, use, keep
        self.rule = None if rule.is_titans else rule
        self.period = math.lcm(chunk, keys, (reset or 1) * keys) // keys
        width = dim // heads
        into = width if rule.features is None else rule.features.width(width)
        self.shapes = rule.network.shapes(into, width, depth, expansion)
        self.gate_sizes = memory_rule.gate_sizes(rule, self.shapes, momentum, forgetting)

        self.inner, self.channels = dim, (1 + 2 * keys) * dim
        self.qkv = nn.Linear(dim, self.channels, bias=False)
        self.convolution = nn.Parameter(torch.empty(self.channels, conv)) if conv else None
        self.controls = SmallLinear(dim, heads * sum(self.gate_sizes.values()))
        self.controls.weight.requires_grad_(gates != "constant")
        self.initial_weights = nn.ParameterList([torch.empty(heads, *shape) for shape in self.shapes])
        self.initial_momentum = nn.ParameterList(
            [torch.empty(heads, *shape) for shape in self.shapes] if momentum and learn_momentum else []
        )
        learned: Any = rule.features if getattr(rule.features, "learned", False) else None
        self.coefficients = None if learned is None else nn.Parameter(torch.empty(len(learned.initial())))
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
        yield from memory_rule.problems(fields)

    def past(self) -> int | None:
        reset = None if self.rule is None else self.rule.reset
        return None if reset is None else reset + self.conv

    def reset_parameters(self) -> None:
        """Initialize all parameters as described in ``initialize_memory``."""
        initialize_memory(self)

    def init_state(self, batch_size: int) -> NeuralMemoryState:
        # the fast weights are of the parameters' dtype, but at least float32
        new, dtype = self.output_gain.new_zeros, torch.promote_types(self.output_gain.dtype, torch.float32)
        weights: list[Tensor] = []
        momentum: list[Tensor] = []
        # copies, because the optimizer changes parameters in place, and FSDP frees their memory
        for part, parameters in ((weights, self.initial_weights), (momentum, self.initial_momentum)):
            if not isinstance(parameters, nn.ParameterList):
                raise TypeError(
                    f"NeuralMemory: around its initial weights there is a {type(parameters).__name__} now: PEFT's "
                    "target_parameters adapts linear layers in blocks, and no other parameters; train these themselves "
                    "(modules_to_save=['titans'] for memories of tb.swap)"
                )
            for x in parameters:
                part.append(x.to(dtype, copy=True).expand(batch_size, *x.shape))
        if self.momentum and not momentum:
            for x in weights:
                momentum.append(torch.zeros_like(x[:1]).expand_as(x))
        # not a `new` of a parameter, which torch.vmap over parameters would hide the values of
        position = torch.zeros(batch_size, dtype=torch.int64, device=self.output_gain.device)
        if not position.is_cpu:
            known(position, [0] * batch_size)
        memory = MemoryState(tuple(weights), tuple(momentum), tuple(weights), position)
        return NeuralMemoryState(
            memory if self.rule is None else memory_rule.start(self, memory),
            new(batch_size, self.conv - 1, self.channels) if self.conv else None,
            new(batch_size, self.heads * sum(self.gate_sizes.values())) if self.gates == "chunk" else None,
        )

    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = None,
        *,
        mask: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Write and read each token. ``x``: ``[batch, time, dim]`` -> outputs of the same shape, and the new state."""
        y, state = self.update(x, state, mask=mask, documents=documents)
        if mask is None:
            return self.project_output(y, x), state
        valid = mask.unsqueeze(-1)
        # masked inputs may be NaN, which must not reach gradients
        return torch.where(valid, self.project_output(y, torch.where(valid, x, 0.0)), 0.0), state

    def write(self, x: Tensor, state: NeuralMemoryState, mask: Tensor | None = None) -> NeuralMemoryState:
        """Return the state after all tokens of ``x`` are written."""
        return self(x, state, mask=mask)[1]

    def read(self, x: Tensor, state: NeuralMemoryState) -> Tensor:
        """Query the memory with each token of ``x`` [batch, time, dim] as if it came next. Does not write."""
        check_call(self, x, state)
        y = memory_decode.read(self, x, state) if x.shape[1] == 1 else None
        return self.read_projected(self.project_queries(x), state) if y is None else y

    def project_queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The part of ``read`` that does not depend on the state: projected queries and the output gate."""
        plain = is_plain(self.qkv)
        projected = project(x, self.qkv.weight[: self.dim]) if plain else linear(self.qkv, x)[..., : self.inner]
        return projected, linear(self.output_gate, x)

    def read_projected(self, projected: Sequence[Tensor], state: NeuralMemoryState) -> Tensor:
        """``read(x, state)`` from ``project_queries(x)``."""
        queries, gate = projected
        if self.convolution is None:
            queries = queries.to(self.output_gain.dtype)
        q = query(queries, self.convolution, state.convolution, self.heads)
        if self.rule is None:
            y = read_memory(q, state.memory.weights, self.activation, self.norm_gain)
        else:
            y = memory_rule.recall(self, q, state.memory)
        return linear(self.output, gated_norm(y, self.output_gain, gate))

    def update(
        self,
        x: Tensor,
        state: NeuralMemoryState | None,
        *,
        mask: Tensor | None = None,
        documents: Documents | None = None,
        gates: Tensor | None = None,
        layout: Layout | None = None,
        ends: list[int] | None = None,
        zeros: int = 0,
        inputs: tuple[Any, Tensor | None, Tensor | None] | None = None,
    ) -> tuple[Tensor, NeuralMemoryState]:
        """``forward`` up to the outputs of the operation, ``[batch, time, heads, dim / heads]``.

        If ``gates``, the result of ``controls``, is given, ``x`` is that of ``qkv``. ``layout`` in place of ``mask``:
        the valid tokens are at the beginning of each row. ``ends``: the rows whose states are returned, by default all.
        ``zeros``: how many zeros follow the numbers of each value; the matrix of the state has as many more rows.
        ``inputs``: what the method of this name returns.
        """
        if documents is not None:
            # masked inputs may be NaN, which must not reach gradients
            x = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)

            def learn(
                x: Tensor, gates: Tensor, state: NeuralMemoryState | None, layout: Layout | None, ends: list[int] | None
            ) -> tuple[Tensor, NeuralMemoryState]:
                return self.update(x, state, gates=gates, layout=layout, ends=ends, zeros=zeros)

            projected = [linear(self.qkv, x), linear(self.controls, x)]
            return run_documents(learn, documents, projected, state, mask, self.init_state, aligned=True)
        if mask is not None:
            layout = align(mask)
            x = layout.spread(x)
        state = self.init_state(x.shape[0]) if state is None else state
        if inputs is None:
            inputs = self.inputs(x, state, None if layout is None else layout.length, gates)
        tokens, history, gates = inputs
        if zeros:
            tokens = tokens._replace(v=pad(tokens.v, (0, zeros)))
        before: Any = state.memory
        memory: MemoryState | LearnerState | None
        if self.use == "read" and self.rule is None:
            y, memory = read_memory(tokens.q, before.weights, self.activation, self.norm_gain), None
        elif self.use == "read":
            y, memory = memory_rule.recall(self, tokens.q, before), None
        elif self.rule is None:
            y, memory = titans_memory(
                tokens.q, tokens.k, tokens.v, tokens.theta, tokens.eta, tokens.alpha, before, self.chunk,
                self.activation, self.norm_gain, None if layout is None else layout.filled,
                clip=self.clip, read=self.retrieve, keep=self.keep, threshold=self.threshold, ends=ends,
            )  # fmt: skip
        else:
            y, memory = memory_rule.learn(self, tokens, before, None if layout is None else layout.filled, ends)
        if active:
            report_learned(self, tokens, before, memory, layout)
        if mask is not None and layout is not None:
            y = layout.collect(y)
        if ends is not None:
            before, history, gates = select((before if memory is None else None, history, gates), ends)
        return y, NeuralMemoryState(memory or before, history, gates)

    def inputs(
        self, x: Tensor, state: NeuralMemoryState, length: Tensor | None, gates: Tensor | None = None
    ) -> tuple[Any, Tensor | None, Tensor | None]:
        """Return the inputs of the operation, and the fields ``convolution`` and ``gates`` of the next state.

        ``length``: ``[batch]``, the number of valid tokens at the start of each row; ``None`` if all are valid.
        """
        if length is None and gates is None and x.shape[1] == 1:
            found = memory_decode.inputs(self, x, state)
            if found is not None:
                return found
        projected, dtype = linear(self.qkv, x) if gates is None else x, self.output_gain.dtype
        if self.convolution is None or self.rule is not None:
            projected = projected.to(dtype)  # under autocast, the state keeps its dtype
        if self.rule is None:
            q, k, v, history = query_key_value(projected, self.convolution, state.convolution, self.heads, length)
            if self.use == "read":
                return Tokens(q, k, v, q.new_zeros(q.shape[:3]), None, None), history, state.gates
        raw, gates = (linear(self.controls, x) if gates is None else gates).to(dtype), state.gates
        if gates is not None:
            raw, gates = memory_rule.gates_of_chunks(raw, gates, state.memory.position, self.chunk, length)
        raw = raw.to(state.memory.weights[0].dtype)
        if self.rule is not None:
            writes, history = memory_rule.inputs(self, projected, raw, state.convolution, length)
            return writes, history, gates
        gate = hardsigmoid if self.gating == "hard_sigmoid" else torch.sigmoid
        theta, *others = gate(raw).split(self.heads, dim=-1)
        eta, alpha = others[0] if self.momentum else None, others[-1] if self.forgetting else None
        return Tokens(q, k, v, theta * self.max_step, eta, alpha), history, gates

    def project_output(self, y: Tensor, x: Tensor) -> Tensor:
        """Normalize the outputs ``y`` of the operation per head, gate them by ``x`` and project them."""
        if self.use == "write":
            return torch.zeros_like(x)
        if fuses(x, self.output_gate, self.output):
            return decode.gated_output(y, self.output_gain, x, self.output_gate.weight, self.output.weight)
        return linear_of(self.output, gated_norm, y, self.output_gain, linear(self.output_gate, x))
