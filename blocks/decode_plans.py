"""The decode plans of the built-in blocks. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention.decode import Cache, prepare_attention
from ..kernels.dispatch import advanced, integers
from ..kernels.linear import is_plain, is_unmodified, prepare_projection
from ..kernels.memory import Tokens
from ..kernels.memory.decode import prepare_read, prepare_step
from ..kernels.norm_gate.decode import prepare_feed_forward, prepare_gate, prepare_gated_output, prepare_rms_norm
from ..kernels.short_conv.decode import prepare_inputs
from . import memory_rule
from .attention import FEW, Attention, AttentionState
from .block import as_memory
from .combinators import Chain, Gate, Layer, Persistent, Residual
from .context import Context, ContextState, restart
from .decode import Decoder, Reader, decode_plan, decoder, read_plan, reader
from .feedforward import FeedForward
from .layers import Gating, RMSNorm
from .memory import NeuralMemory, NeuralMemoryState
from .memory_decode import decode_layers
from .observers import active, report_learned, suppressed
from .state import State


@decode_plan(NeuralMemory)
def _memory(block: NeuralMemory, rows: int, time: int, step: int) -> Decoder | None:
    layers = decode_layers(block, block.output_gain.new_empty(rows, time, block.dim))
    if layers is None:
        return None
    inputs, output = prepare_inputs(layers, rows), _memory_output(block, rows)
    if inputs is None or output is None:
        return None
    (q, k, v, (theta, *others), _), load = inputs
    tokens = Tokens(q, k, v, theta, others[0] if block.momentum else None, others[-1] if block.forgetting else None)
    write = prepare_step(tokens, block.shapes, block.norm_gain, memory_rule.options(block))
    if write is None:
        return None

    def decode(x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, State]:
        if block.use != "both":  # frozen meanwhile
            y, after = block(x, state)
            return y, after
        history = load(x, state.convolution)
        before: Any = state.memory
        y, memory = write(before)
        if active:
            report_learned(block, tokens, before, memory)
        return output(y, x), NeuralMemoryState(memory, history, None)

    return decode


@read_plan(NeuralMemory)
def _read_memory(block: NeuralMemory, rows: int) -> Reader | None:
    layers = decode_layers(block, block.output_gain.new_empty(rows, 1, block.dim))
    if layers is None:
        return None
    inputs, output = prepare_inputs(layers.queries(), rows), _memory_output(block, rows)
    if inputs is None or output is None:
        return None
    (q, *_), load = inputs
    query = prepare_read(q, block.shapes, block.activation, block.norm_gain)
    if query is None:
        return None

    def read(x: Tensor, state: NeuralMemoryState) -> Tensor:
        load(x, state.convolution)
        return output(query(state.memory.weights), x)

    return read


def _memory_output(block: NeuralMemory, rows: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    return prepare_gated_output(block.output_gain, block.output_gate.weight, block.output.weight, (rows, 1))


@decode_plan(Attention)
def _attention(block: Attention, rows: int, time: int, step: int) -> Decoder | None:
    window = block.window
    if window is None or time > FEW or time % step or not is_plain(block.qkv, block.out):
        return None
    weight, out = block.qkv.weight, block.out.weight
    if not weight.is_cpu:
        return None
    heads = weight.new_empty(rows, time, len(weight) // block.head_dim, block.head_dim)
    load = prepare_projection(weight, heads.flatten(2))
    output = prepare_projection(out, out.new_empty(rows, time // step, block.dim))
    attend = prepare_attention(heads, block.gain, heads=block.heads, window=window, base=block.rope, step=step)
    if load is None or attend is None or output is None:
        return None

    def decode(x: Tensor, state: AttentionState) -> tuple[Tensor, State]:
        load(x)
        y, keys, values = attend(Cache(*state))
        cached = (state.cached + time).clamp_(max=window - 1)
        after = AttentionState(keys, values, cached, state.position + time, state.prefix_keys, state.prefix_values)
        return output(y), after

    return decode


@decode_plan(FeedForward)
def _feed_forward(block: FeedForward, rows: int, time: int, step: int) -> Decoder | None:
    if step != 1 or block.kind != "swiglu" or not is_plain(block.up, block.down):
        return None
    run = prepare_feed_forward(block.up.weight, block.down.weight, (rows, time))
    return None if run is None else lambda x, state: (run(x), state)


@decode_plan(RMSNorm)
def _rms_norm(block: RMSNorm, rows: int, time: int, step: int) -> Decoder | None:
    run = prepare_rms_norm(block.gain, (rows, time), block.eps) if step == 1 else None
    return None if run is None else lambda x, state: (run(x), state)


def _gating(gating: Gating, rows: int, time: int) -> Callable[..., Tensor]:
    run = None
    exact = type(gating) is Gating and is_unmodified(gating, "forward")
    if gating.form == "sigmoid" and not gating.others and exact:
        run = prepare_gate(gating.gain_a, gating.gain_b, (rows, time), gating.eps)
    return gating if run is None else run


@decode_plan(Gate)
def _gate(block: Gate, rows: int, time: int, step: int) -> Decoder | None:
    if step != 1:
        return None
    parts = [decoder(branch, rows, time=time) for branch in block.branches]
    gate = _gating(block.gate, rows, time)

    def decode(x: Tensor, state: State) -> tuple[Tensor, State]:
        outputs, states = [], []
        for part, before in zip(parts, state):
            y, after = part(x, before)
            outputs.append(y)
            states.append(after)
        block.observe(outputs, None)
        return gate(*outputs), tuple(states)

    return decode


@read_plan(Gate)
def _read_gate(block: Gate, rows: int) -> Reader:
    parts = [reader(as_memory(branch), rows) for branch in block.branches]
    gate = _gating(block.gate, rows, 1)
    return lambda x, state: gate(*[part(x, before) for part, before in zip(parts, state)])


@decode_plan(Chain)
def _chain(block: Chain, rows: int, time: int, step: int) -> Decoder | None:
    if step != 1:
        return None
    parts = [decoder(child, rows, time=time) for child in block.of]

    def decode(x: Tensor, state: State) -> tuple[Tensor, State]:
        states = []
        for part, before in zip(parts, state):
            x, after = part(x, before)
            states.append(after)
        return x, tuple(states)

    return decode


@read_plan(Chain)
def _read_chain(block: Chain, rows: int) -> Reader:
    parts = [reader(as_memory(child), rows) for child in block.of]

    def read(x: Tensor, state: State) -> Tensor:
        for part, before in zip(parts, state):
            x = part(x, before)
        return x

    return read


@decode_plan(Residual)
def _residual(block: Residual, rows: int, time: int, step: int) -> Decoder:
    inner = decoder(block.of, rows, time=time, step=step)

    def decode(x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = inner(x, state)
        return x[:, step - 1 :: step] + y, state

    return decode


@read_plan(Residual)
def _read_residual(block: Residual, rows: int) -> Reader:
    inner = reader(as_memory(block.of), rows)
    return lambda x, state: x + inner(x, state)


@decode_plan(Persistent)
def _persistent(block: Persistent, rows: int, time: int, step: int) -> Decoder:
    return decoder(block.of, rows, time=time, step=step)


@read_plan(Persistent)
def _read_persistent(block: Persistent, rows: int) -> Reader:
    return reader(as_memory(block.of), rows)


@decode_plan(Layer)
def _layer(block: Layer, rows: int, time: int, step: int) -> Decoder | None:
    if step != 1:
        return None
    parts = [
        (decoder(norm, rows, time=time), decoder(child, rows, time=time))
        for norm, child in zip(block.norms, block.blocks)
    ]

    def decode(x: Tensor, state: State) -> tuple[Tensor, State]:
        states = []
        for (norm, part), before in zip(parts, state):
            y, after = part(norm(x, None)[0], before)
            x = x + y
            states.append(after)
        return x, tuple(states)

    return decode


@decode_plan(Context)
def _context(block: Context, rows: int, time: int, step: int) -> Decoder | None:
    if time != 1 or step != 1 or block.write != "attended":
        return None
    recall, learn = reader(as_memory(block.memory), rows), decoder(block.memory, rows)
    attend, gate, segment = decoder(block.attend, rows, time=2, step=2), _gating(block.gate, rows, 1), block.segment

    def decode(x: Tensor, state: ContextState) -> tuple[Tensor, State]:
        memory, snapshot, attended, position = state
        begins = [place > 0 and place % segment == 0 for place in integers(position)]
        if any(begins):
            snapshot = restart(begins, snapshot, memory)
            attended = restart(begins, attended, block.fresh_attention(rows))
        stream = torch.cat((recall(x, snapshot), x), dim=1)
        if active:
            with suppressed():
                y, attended = attend(stream, attended)
        else:
            y, attended = attend(stream, attended)
        m, memory = learn(y, memory)
        if active:
            block.report(y, m)
        return gate(y, m), ContextState(memory, snapshot, attended, advanced(position, 1))

    return decode
