"""The torch backend of the memory operation: the chunkwise form with its own backward, for any device and any sequence.

A sequence is cut at chunk boundaries, and rows at different phases of their chunks are lined up. Tokens then are
``[chunks, batch * heads, b, d]`` and are worked on a group of chunks at a time:

* Writing goes chunk by chunk, because each chunk's gradients are taken at the weights it starts from: keys forward,
  errors back, and the state on by one product with the gates (``mix``) and one with the errors.
* Reading then takes all queries of the group at once, in large batched products.
* Backward goes through the groups from the last to the first. From the states at chunk starts, which were kept or are
  computed again from the one at the group's start, everything else is recomputed; reads are differentiated in one
  batch, writes chunk by chunk in reverse. A write contains a gradient, so its backward is of second order.

``chunk_torch.ChunkNetwork`` computes a group; ``triton.network.TritonNetwork`` does the same in Triton kernels.
Queries, keys and values may have another dtype than gates and state if the network's kernels cast them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import differentiable
from ..dispatch import advanced, full_precision, integers, on_host, placed
from ..padding import align
from .channels_torch import ChannelNetwork
from .chunk_torch import ChunkNetwork, Scratch, Written, WrittenGrad
from .closed_form import closed_form_memory
from .decay_torch import ChunkDecay
from .network_torch import memory_network, repeat_gain
from .state import CHANNELS, MemoryState, Options, Tokens, where_rows

GROUP = 8
"""Chunks worked on together on a CPU: enough for large products, few enough that their work stays near the cache."""
CHECKPOINT_BYTES = 160 * 2**20
"""Every chunk's starting state is kept for backward up to this size on a CPU (beyond it one in ``GROUP`` or fewer), and
so are the network's hidden values (beyond it they are recomputed)."""
GPU_SHARE = 0.5
"""Share of a GPU's memory that may be in use for a call to keep more than ``CHECKPOINT_BYTES``."""
GPU_BYTES = 80 * 2**30
"""Memory of a GPU that is only counted on (``tools/gpu/counting.py``)."""

_TOKENS = len(Tokens._fields)
_Network: TypeAlias = Callable[..., ChunkNetwork]
_Whole: TypeAlias = Callable[..., tuple[Tensor, ...]]
_Stack: TypeAlias = tuple[Tensor, ...]


# -- any sequence as whole chunks --------------------------------------------------------------------------------------


def chunkwise_memory(
    tokens: Tokens,
    state: MemoryState,
    norm: Tensor | None,
    mask: Tensor | None,
    options: Options,
    network: _Network | None = None,
    whole: _Whole | None = None,
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for any length, positions and mask.

    ``whole``: computes whole chunks, in place of ``_Chunkwise`` with ``network``.
    """
    if network is None:
        network = ChannelNetwork if CHANNELS in options.rare(tokens) else ChunkNetwork
    whole = whole or functools.partial(_Chunkwise.apply, network)
    if options.gated:
        state = _together(state)
    phases = [position % options.chunk for position in integers(state.position)]
    if mask is not None and bool(on_host(mask).all()):
        mask = None
    if mask is None and len(set(phases)) == 1:
        y, after = _aligned(tokens, state, norm, phases[0], options, whole)
    else:
        y, after = _ragged(tokens, state, norm, phases, mask, options, whole)
    return y, _apart(after) if options.gated else after


def _aligned(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, phase: int, options: Options, whole: _Whole
) -> tuple[Tensor, MemoryState]:
    """All rows at one phase: the rest of the current chunk, then whole chunks, then the beginning of the last."""
    chunk, time = options.chunk, tokens.q.shape[1]
    lead = min(time, -phase % chunk)
    last = time - (time - lead) % chunk  # where the last chunk begins, if it does at all
    spans = [(lead, lead), (last, chunk), (time, time - last)]
    anchor, outputs = state.anchor if phase else state.weights, []
    for stop, y, after in _spans(tokens, state, norm, None, anchor if phase else None, spans, options, whole):
        outputs.append(y)
        if (phase + stop) % chunk == 0:
            anchor = after.weights
    return _joined(outputs), after._replace(anchor=anchor, position=advanced(state.position, time))


def _ragged(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, phases: list[int], mask: Tensor | None, options: Options,
    whole: _Whole,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """Rows at different phases, or masked tokens: each row's tokens are placed in a grid of chunks.

    Empty slots are identity updates (theta = 0, alpha = 0, eta = 1, and no momentum added). A row's anchor is the
    weights at the start of its last chunk, so spans end wherever some row's last chunk begins.
    """
    chunk, theta = options.chunk, tokens.theta
    if mask is None:
        mask = torch.ones(theta.shape[:2], dtype=torch.bool, device=theta.device)
    phase = placed(torch.tensor(phases), theta.device)
    layout = align(mask, phase)
    if layout.filled.shape[1] > chunk:
        layout = align(mask, phase, multiple=chunk)
    slots, time, past = layout.filled.shape[1], theta.shape[1], options.window - 1
    if slots == 0:  # every token is masked, and every row at a chunk start
        return torch.zeros_like(tokens.like_outputs()), state
    size = min(slots, chunk)
    eta = None if tokens.eta is None else layout.spread(tokens.eta, empty=1.0)
    # the writes before the first token stay beside it
    writes = align(F.pad(mask, (past, 0), value=True), phase, slots=slots + past) if past else layout
    spread = lambda x: (layout if x.shape[1] == time else writes).spread(x)  # noqa: E731
    tokens = tokens._replace(eta=None).map(spread)._replace(eta=eta)
    valid = layout.filled.unsqueeze(-1).expand_as(tokens.theta).to(tokens.theta)

    last = (phase + layout.length) // chunk * size  # the slot at which each row's last chunk begins
    anchor, outputs = where_rows(phase > 0, state.anchor, state.weights), []
    stops = {(p + n) // chunk * size for p, n in zip(phases, integers(layout.length))}
    spans = [(stop, size) for stop in sorted({*stops, slots})]
    for stop, y, after in _spans(tokens, state, norm, valid, anchor, spans, options, whole):
        outputs.append(y)
        anchor = where_rows(last == stop, after.weights, anchor)
    anchor = where_rows(layout.length > 0, anchor, state.anchor)
    y = layout.collect(_joined(outputs))
    return y, after._replace(anchor=anchor, position=advanced(state.position, layout.length))


def _spans(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, valid: Tensor | None, anchor: _Stack | None,
    spans: list[tuple[int, int]], options: Options, whole: _Whole,
) -> Iterator[tuple[int, Tensor, MemoryState]]:  # fmt: skip
    """One span of whole chunks after the other, each given by the token it ends before and its chunk length.

    Yields the end, the outputs, and the state with the weights and momentum there. ``anchor`` is the first span's,
    where that begins inside a chunk. ``valid`` ``[batch, time, heads]`` is 0 at slots without a token.
    """
    layers, start = len(state.weights), 0
    weights, momentum = state.weights, () if tokens.eta is None else state.momentum
    for stop, chunk in spans:
        if stop == start:
            continue
        span = slice(start, stop)
        y, *stacks = whole(
            options._replace(chunk=chunk), layers, None if valid is None else valid[:, span],
            *tokens.at(span), norm, *weights, *momentum, *(anchor or ()),
        )  # fmt: skip
        weights, momentum = tuple(stacks[:layers]), tuple(stacks[layers:])
        yield stop, y, state._replace(weights=weights, momentum=momentum or state.momentum)
        start, anchor = stop, None


def _together(state: MemoryState) -> MemoryState:
    """A gated network as two layers, the first of which has both products, one above the other."""
    weights, momentum, anchor = ((torch.cat([x[0], x[2]], 2), x[1]) if x else () for x in state[:3])
    return MemoryState(weights, momentum, anchor, state.position)


def _apart(state: MemoryState) -> MemoryState:
    halves = [x[0].chunk(2, 2) if x else () for x in state[:3]]
    weights, momentum, anchor = ((half[0], x[1], half[1]) if x else () for half, x in zip(halves, state[:3]))
    return MemoryState(weights, momentum, anchor, state.position)


def _joined(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


# -- whole chunks, a group at a time -----------------------------------------------------------------------------------


def chunks_formula(ctx: Any, *tensors: Any) -> tuple[Tensor, ...]:
    tokens, (gain, *state) = Tokens(*tensors[:_TOKENS]), tensors[_TOKENS:]
    q, options, layers, mask = tokens.q, ctx.options, ctx.layers, None
    position, past = torch.zeros(len(q), dtype=torch.int64), options.window - 1
    weights, momentum, anchor = (tuple(state[i * layers : (i + 1) * layers]) for i in range(3))
    if tokens.eta is None:
        momentum, anchor = (), momentum
    if ctx.valid is not None:  # a row's first token has its place in the chunk
        mask = ctx.valid[..., 0] > 0
        position = mask.to(torch.uint8).argmax(1)
        if past:  # and the writes before it come first
            at = torch.arange(past + q.shape[1], device=q.device).expand(len(q), -1)
            at = torch.where(at < past, at + position.unsqueeze(1), at)
            row = torch.arange(len(q), device=q.device).unsqueeze(1)
            tokens = tokens.map(lambda x: x[row, at] if x.shape[1] > q.shape[1] else x)
    elif anchor:  # the rest of a chunk
        options, position = options._replace(chunk=options.chunk + 1), position + 1
    tokens = tokens.map(lambda x: x.to(weights[0]))
    before = MemoryState(weights, momentum, anchor or weights, position)
    if options.gated:
        before = _apart(before)
    with full_precision(q.device.type):
        y, after = closed_form_memory(tokens, before, gain, mask, options)
    if options.gated:
        after = _together(after)
    return (y.to(q), *after.weights, *after.momentum)


class _Chunkwise(torch.autograd.Function):
    """``time`` tokens, a multiple of ``options.chunk``, that start at a chunk boundary -> ``y``, weights, momentum."""

    @staticmethod
    def forward(
        ctx: Any, network: _Network, options: Options, layers: int, valid: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        tokens, (gain, *state) = Tokens(*tensors[:_TOKENS]), tensors[_TOKENS:]
        q, k, v = tokens[:3]
        b, past = options.chunk, options.window - 1
        batch, time, heads, _ = q.shape
        s = 1 if tokens.eta is None else 2
        anchor = [_merge_heads(w) for w in state[s * layers :]] or None
        shapes = [(batch * heads, s, *w.shape[2:]) for w in state[:layers]]
        chunks = time // b
        # bytes of the state, and of a chunk's outputs of all layers
        state_bytes = sum(map(math.prod, shapes)) * state[0].element_size()
        outputs = batch * (past + b) * heads * sum(out for *_, out, _ in shapes) * state[0].element_size()
        learns = any(ctx.needs_input_grad)
        room = room_of(q, chunks * (state_bytes + 2 * outputs) if learns else 0)
        interval, saves_activations, size = plan_memory(
            chunks, state_bytes, outputs, options.keep if learns else 1, room, on_cpu=q.is_cpu
        )
        interval = interval if learns else 0
        saves_activations = saves_activations and learns and options.read != "anchor"

        y = q.new_empty(batch, time, heads, v.shape[-1])
        scratch = Scratch.of(state[0])
        net = network(options, None if gain is None else repeat_gain(gain, batch), scratch)
        buffers = Written.allocate(
            size, batch * heads, past + b, shapes, scratch, backward=False, clip=options.clip is not None
        )
        # where every state is kept, it is computed in the place it is kept at
        states = chunks + 1 if interval == 1 else -(-chunks // size)
        checkpoints = [w.new_empty(states, *shape) for w, shape in zip(state, shapes)] if interval else []
        made = lambda shape, b: state[0].new_empty(chunks, batch * heads, b, shape[2])  # noqa: E731
        key_activations = [made(x, past + b) for x in shapes] if saves_activations and net.takes_outputs else []
        query_activations = [made(x, b) for x in shapes] if saves_activations else []
        stacks: list[Tensor] = []
        for group, (first, times) in enumerate(groups_of(chunks, size, b)):
            decay = net.decay(*chunks_of((*tokens[3:6], valid, tokens.gamma), times, b, time))
            keys, values, queries = chunks_of((k, v, q), times, b, time)
            span = slice(first, first + decay.mix.shape[0])
            written = buffers.first(decay.mix.shape[0])
            if tokens.delta is not None:
                written.deltas[:] = [_chunks(tokens.delta, times, b, time).unsqueeze(-1)]
            if key_activations:
                written.outputs[:] = [x[span] for x in key_activations]
            if interval == 1:
                written.stacks[:] = [store[first : span.stop + 1] for store in checkpoints]
            if first == 0:
                _fill_stacks([buffer[0] for buffer in written.stacks], state)
            elif interval != 1:
                for buffer, stack in zip(written.stacks, stacks):
                    buffer[0] = stack
            own = anchor if first == 0 else None
            net.write(keys, values, decay, written, own)
            if interval > 1:
                for store, buffer in zip(checkpoints, written.stacks):
                    store[group] = buffer[0]
            if options.read == "anchor":
                anchors = _anchors(written, own)
                read = memory_network(queries.to(anchors[0]), anchors, net.activation, net.gain, net.matmul)
            else:
                read = net.read(queries, decay, written, [x[span] for x in query_activations])
            scatter(y, read, times, b)
            stacks = [buffer[-1] for buffer in written.stacks]
        if interval:
            ctx.save_for_backward(*tensors, *key_activations, *query_activations, *checkpoints)
            ctx.options, ctx.network, ctx.layers, ctx.valid, ctx.size = options, network, layers, valid, size
            ctx.saves_all, ctx.saves_activations = interval == 1, saves_activations
        scratch.release()
        # copies, since the buffers are reused, and kept states would live as long as the last one
        ends = [stack.movedim(1, 0).clone(memory_format=torch.contiguous_format) for stack in stacks]
        return (y, *(end[part].unflatten(0, (batch, heads)) for part in range(s) for end in ends))

    @staticmethod
    @differentiable(chunks_formula, first=4)
    def backward(ctx: Any, grad_y: Tensor, *grad_state: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grad_y.device.type):
            return _backward(ctx, grad_y, *grad_state)


def _backward(ctx: Any, grad_y: Tensor, *grad_state: Tensor) -> tuple[Tensor | None, ...]:
    options, layers, size = ctx.options, ctx.layers, ctx.size
    b, past = options.chunk, options.window - 1
    tokens, (gain, *state) = Tokens(*ctx.saved_tensors[:_TOKENS]), ctx.saved_tensors[_TOKENS:]
    q, k, v = tokens[:3]
    state, checkpoints = state[:-layers], state[-layers:]
    key_activations: list[Tensor] = []
    query_activations: list[Tensor] = []
    batch, time, heads, _ = q.shape
    s = 1 if tokens.eta is None else 2
    chunks = time // b
    scratch = Scratch.of(checkpoints[0])
    net = ctx.network(options, None if gain is None else repeat_gain(gain, batch), scratch)
    if ctx.saves_activations:
        state, query_activations = state[:-layers], state[-layers:]
        if net.takes_outputs:
            state, key_activations = state[:-layers], state[-layers:]
    anchor = [_merge_heads(w) for w in state[s * layers :]] or None
    shapes = [x.shape[1:] for x in checkpoints]
    buffers = Written.allocate(
        size, batch * heads, past + b, shapes, scratch, backward=True, clip=options.clip is not None
    )
    grad_buffers = WrittenGrad.allocate(buffers, scratch)

    # those of tokens that are in the windows of two chunks are sums
    grads = tokens.map(lambda x: (x.new_zeros if x.shape[1] > time else x.new_empty)(x.shape))
    grad_gain: Any = None
    grad_anchor: list[Tensor] | None = None
    if anchor:
        zeros = anchor[0].new_zeros(sum(w.numel() for w in anchor)).split([w.numel() for w in anchor])
        grad_anchor = [x.view(w.shape) for x, w in zip(zeros, anchor)]
    grad_end: list[Tensor] = []
    for group, (first, times) in reversed(list(enumerate(groups_of(chunks, size, b)))):
        *found, valid = chunks_of((*tokens[3:6], tokens.gamma, ctx.valid), times, b, time)
        gates = [None if x is None else x.detach().requires_grad_() for x in found]
        with torch.enable_grad():
            graph = net.decay(*gates[:3], valid, gates[3])
        decay = ChunkDecay(*(x.detach() for x in graph))
        keys, values, queries = chunks_of((k, v, q), times, b, time)
        own = anchor if first == 0 else None
        written, grad = buffers.first(len(keys)), grad_buffers.first(len(keys))
        if tokens.delta is not None:
            written.deltas[:] = [_chunks(tokens.delta, times, b, time).unsqueeze(-1)]
        if grad_end:
            for buffer, end in zip(grad.stacks, grad_end):
                buffer[-1] = end  # before anything else: it may be the first entry of these same buffers
        else:
            _fill_stacks([buffer[-1] for buffer in grad.stacks], grad_state)
        span = slice(first, first + len(keys))
        for buffer, store in zip(written.outputs, key_activations):
            buffer.copy_(store[span])
        if ctx.saves_all:
            written.stacks[:] = [store[span] for store in checkpoints]
            net.rewrite(keys, values, written, own, outputs_known=bool(key_activations))
        else:
            for buffer, store in zip(written.stacks, checkpoints):
                buffer[0] = store[group]
            net.write(keys, values, decay, written, own)
        grad_reads, grad_read, grad_carry = _chunks(grad_y, times, b, time), None, None
        if options.read == "anchor":
            grad_q, gain_read = _read_backward(grad_reads, queries, written, net, grad, own, grad_anchor)
        else:
            if ctx.saves_activations:
                reading = [x[span] for x in query_activations]
            else:
                reading = [
                    scratch(f"query activation {l}", *x.shape[:2], b, x.shape[3]) for l, x in enumerate(written.outputs)
                ]
                net.read(queries, decay, written, reading)
            grad_q, grad_read, grad_carry, gain_read = net.read_backward(
                grad_reads, queries, decay, written, reading, grad
            )
        grad_v, grad_write, grad_mix, gain_write = net.write_backward(
            keys, values, decay, written, grad, own, grad_anchor if own else None
        )
        grad_end = [buffer[0] for buffer in grad.stacks]

        for x, value in ((grads.q, grad_q), (grads.k, grad.inputs[0]), (grads.v, grad_v)):
            scatter(x, value, times, b)
        pushed = (grad_read, grad_carry, grad_write, grad_mix)
        reached = [(x, g) for x, g in zip(graph, pushed) if x.requires_grad and g is not None]
        wanted = [x for x in gates if x is not None]
        grad_gates = iter(torch.autograd.grad([x for x, _ in reached], wanted, [g for _, g in reached]))
        for gate in (*grads[3:6], grads.gamma):
            if gate is not None:
                scatter(gate, next(grad_gates), times, b)
        if grads.delta is not None:
            scatter(grads.delta, grad.deltas[0].squeeze(-1), times, b)
        if gain_read is not None and gain_write is not None:
            both = gain_read + gain_write
            grad_gain = both if grad_gain is None else grad_gain + both
    scratch.release()
    starts = [stack.movedim(1, 0).clone(memory_format=torch.contiguous_format) for stack in grad_end]
    state = [start[part] for part in range(s) for start in starts] + (grad_anchor or [])
    if grad_gain is not None:
        grad_gain = grad_gain.view(batch, heads, -1).sum(0)
    return (None, None, None, None, *grads, grad_gain, *(x.unflatten(0, (batch, heads)) for x in state))


def _anchors(written: Written, first: list[Tensor] | None) -> list[Tensor]:
    """The weights at the start of every chunk, ``[chunks, batch * heads, out, in]``; ``first``: the first chunk's."""
    starts = [stack[: len(x), :, 0] for stack, x in zip(written.stacks, written.inputs)]
    return starts if first is None else [torch.cat([a.unsqueeze(0), x[1:]]) for a, x in zip(first, starts)]


def _read_backward(
    grad_y: Tensor, queries: Tensor, written: Written, net: ChunkNetwork, grad: WrittenGrad,
    first: list[Tensor] | None, grad_first: list[Tensor] | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Through reads at anchors: the gradients of queries and gain; sets ``grad`` but the last stacks."""
    gain = net.gain
    with torch.enable_grad():
        anchors = [x.detach().requires_grad_() for x in _anchors(written, first)]
        leaves = [x.detach().requires_grad_() for x in (queries.to(anchors[0]), *([] if gain is None else [gain]))]
        y = memory_network(leaves[0], anchors, net.activation, None if gain is None else leaves[1], net.matmul)
        grad_q, *rest = torch.autograd.grad(y, [*leaves, *anchors], grad_y.to(y))
    for l, of_weights in enumerate(rest[-len(anchors) :]):
        grad.stacks[l][:-1].zero_()
        if grad_first is not None and first is not None:
            grad_first[l] += of_weights[0]
            of_weights[0].zero_()
        grad.stacks[l][:-1, :, 0] = of_weights
        grad.inputs[l].zero_()
        grad.errors[l].zero_()
    return grad_q, None if gain is None else rest[0]


class MemoryPlan(NamedTuple):
    """What a call keeps for backward, and how much it works on at a time."""

    interval: int
    """Chunks between states that are kept."""
    activations: bool
    """Whether the layers' outputs are kept."""
    group: int
    """Chunks that are worked on together."""


def plan_memory(
    chunks: int, state_bytes: int, output_bytes: int, keep: int | None, room: int, *, on_cpu: bool
) -> MemoryPlan:
    """The plan of a call on ``chunks`` chunks that may take ``room`` bytes.

    Every state is kept while that fits, else one in 8, 16, 32, ...: backward then writes the chunks between them once
    more, one after the other. On a GPU, a group is as long as its work fits in an eighth of the room, so that a call
    launches few kernels.

    Args:
        chunks: of the sequence.
        state_bytes: of the state of all rows.
        output_bytes: of the layers' outputs for a chunk of all rows.
        keep: the interval that was asked for, or ``None``.
        room: bytes.
        on_cpu: whether groups should stay near the cache.
    """
    interval = keep or 1
    if keep is None and chunks * state_bytes > room:
        interval = GROUP
        while chunks * state_bytes > interval * room:
            interval *= 2
    # on a CPU the room is that of either
    left = room if on_cpu else room - chunks // interval * state_bytes
    activations = keep in (None, 1) and 2 * chunks * output_bytes <= left
    if interval > 1:
        return MemoryPlan(interval, activations, min(chunks, interval))
    # states, and about twelve buffers as large as the outputs
    most = GROUP if on_cpu else max(GROUP, room // (8 * (state_bytes + 12 * output_bytes) + 1))
    return MemoryPlan(interval, activations, min(chunks, most))


_rooms: dict[torch.device, tuple[int, int]] = {}
"""By GPU: the room when PyTorch was last asked what is in use, and what calls since then have left of it."""


def room_of(q: Tensor, needed: int) -> int:
    """Bytes that a call which would keep ``needed`` may keep: on a GPU those of ``GPU_SHARE`` of its memory not in use.

    A model asks for every layer and segment, and each finds in use what those before have kept. PyTorch takes as long
    as several launches to say what is in use, so it is asked when an eighth of its last answer is spent.
    """
    if not q.is_cuda:
        return CHECKPOINT_BYTES
    asked, left = _rooms.get(q.device, (0, 0))
    if left - needed < asked - asked // 8 or not asked:
        total, used = GPU_BYTES, 0
        if torch.cuda.is_available():
            total, used = torch.cuda.get_device_properties(q.device).total_memory, torch.cuda.memory_allocated(q.device)
        asked = left = max(0, int(GPU_SHARE * total) - used)
    _rooms[q.device] = asked, left - needed
    return max(CHECKPOINT_BYTES, left)


def groups_of(chunks: int, size: int, b: int) -> list[tuple[int, slice]]:
    """The first chunk, and the tokens, of every group."""
    return [(first, slice(first * b, min(first + size, chunks) * b)) for first in range(0, chunks, size)]


def _chunks(x: Any, times: slice, b: int, time: int) -> Any:
    """``[batch, past + time, heads, ...]`` -> the group's ``[chunks, batch * heads, past + b, ...]``, detached and
    contiguous; ``None`` for ``None``.
    """
    return None if x is None else _chunk_view(x, times, b, time).contiguous().flatten(1, 2)


def _chunk_view(x: Tensor, times: slice, b: int, time: int) -> Tensor:
    past = x.shape[1] - time
    group = x.detach()[:, times.start : times.stop + past].unfold(1, past + b, b).movedim(1, 0)
    return group if x.dim() == 3 else group.mT


def chunks_of(given: Sequence[Any], times: slice, b: int, time: int) -> list[Any]:
    """``_chunks`` of several tensors: on a GPU in one copy, if they are alike."""
    found = [x for x in given if x is not None]
    if found[0].is_cpu or len({(x.shape, x.dtype) for x in found}) > 1:
        return [_chunks(x, times, b, time) for x in given]
    parts = iter(torch.stack([_chunk_view(x, times, b, time) for x in found]).flatten(2, 3).unbind())
    return [None if x is None else next(parts) for x in given]


def scatter(x: Tensor, group: Tensor, times: slice, b: int) -> None:
    """The inverse: sets the tokens of ``x``, or adds to those that are in the windows of several chunks."""
    writes = group.shape[2]
    for start in range(0, writes, b):
        size = min(b, writes - start)
        stop = times.stop - b + start + size
        view = x[:, times.start + start : stop].unfold(1, size, b).movedim(1, 0)
        part = group[:, :, start : start + size].unflatten(1, view.shape[1:3])
        view = view if x.dim() == 3 else view.mT
        if writes > b:
            view += part
        else:
            view.copy_(part)


def _fill_stacks(stacks: Sequence[Tensor], state: Sequence[Tensor]) -> None:
    """Set ``stacks``, of each layer ``[batch * heads, parts, out, in]``: weights, and with two parts momentum."""
    for l, stack in enumerate(stacks):
        torch.stack([_merge_heads(w) for w in state[l : l + stack.shape[1] * len(stacks) : len(stacks)]], 1, out=stack)


def _merge_heads(w: Tensor) -> Tensor:
    """``[batch, heads, ...]`` -> ``[rows, ...]``, contiguous: a network may ignore strides."""
    return w.reshape(-1, *w.shape[2:]).contiguous()
