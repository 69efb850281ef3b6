"""The fast torch path: the chunkwise form with its own backward, for any device, best on a CPU.

The story. Tokens stand as ``[chunks, rows, b, d]`` (a row is a batch row and a head) and are worked on a group of
chunks at a time. Per layer the state is one stack ``[rows, s, out, in]``: weights, and below them momentum.

* Writing goes chunk by chunk, because each chunk's gradients are taken at the weights it starts from: keys forward,
  errors back, and the state on by one product with the gates (``mix``) and one with the errors.
* Reading then answers all queries of the group at once, in large batched products.
* Backward walks the groups from the last to the first. From the states at chunk starts, which were kept or are
  computed again from the one at the group's start, everything else is recomputed; reads are differentiated in one
  batch, writes chunk by chunk in reverse. A write contains a gradient, so its backward is of second order.

Errors ``d`` are half gradients; the factor 2 lives in the decay matrices. Work buffers wait for the next call;
what a caller gets never lies in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from ..dispatch import full_precision
from .buffers import Adjoint, Scratch, Work
from .chunk_network import ChunkNetwork
from .decay import ChunkDecay
from .read_torch import per_row
from .tokens import Options, Tokens

GROUP = 8
"""Chunks worked on together: enough for large products, few enough that their work stays near the cache."""
KEPT_BYTES = 160 * 2**20
"""Every chunk's starting state is kept for backward up to this size (beyond it one in ``GROUP`` or fewer), and so are
the network's hidden values (beyond it they are recomputed)."""


def chunkwise_memory(
    tokens: Tokens,
    real: Tensor | None,
    gain: Tensor | None,
    weights: tuple[Tensor, ...],
    momentum: tuple[Tensor, ...],
    anchor: tuple[Tensor, ...] | None,
    options: Options,
    network: Callable[..., ChunkNetwork] = ChunkNetwork,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Read and write ``time`` tokens, a multiple of ``options.chunk``, that start at a chunk boundary.

    Args:
        tokens: of ``[batch, time, heads, ...]``.
        real: ``[batch, time, heads]`` of 0 and 1, or ``None``: 0 at slots without a token (identity gates).
        gain: ``None`` or ``[heads, d_out]``.
        weights, momentum: ``[batch, heads, out, in]`` per layer; momentum is ``()`` when ``tokens.eta`` is ``None``.
        anchor: where the *first* chunk takes its gradients; ``None``: at ``weights``.
        options: with ``keep=None``, as few states are kept as ``KEPT_BYTES`` allows.

    Returns:
        ``y`` ``[batch, time, heads, d_out]``, final weights, final momentum.
    """
    layers = len(weights)
    outputs = _Chunkwise.apply(options, network, layers, real, *tokens, gain, *weights, *momentum, *(anchor or ()))
    return outputs[0], outputs[1 : 1 + layers], outputs[1 + layers :]


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        network: Callable[..., ChunkNetwork],
        layers: int,
        real: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        q, k, v, theta, eta, alpha, gain, *state = tensors
        b = options.chunk
        batch, time, heads, _ = q.shape
        s = 1 if eta is None else 2
        anchor = [_rows(w) for w in state[s * layers :]] or None
        stacks = [torch.stack([_rows(state[l + part * layers]) for part in range(s)], dim=1) for l in range(layers)]
        chunks = time // b
        keep, hidden_kept = 0, False
        if any(ctx.needs_input_grad):
            keep = options.keep or _fitting(chunks, sum(x.numel() * x.element_size() for x in stacks))
            width = sum(x.shape[2] for x in stacks)
            hidden_kept = (
                options.keep in (None, 1) and 2 * batch * time * heads * width * q.element_size() <= KEPT_BYTES
            )
        size = min(chunks, keep if keep > 1 else GROUP)

        y = q.new_empty(batch, time, heads, v.shape[-1])
        scratch = Scratch.of(q)
        gain_rows = None if gain is None else per_row(gain, batch)
        net = network(options.activation, gain_rows, options.clip, scratch)
        work = Work.allocate(size, batch * heads, b, stacks, scratch, pulled=False, clipped=options.clip is not None)
        # where every state is kept, the states are advanced in the place they are kept at
        kept = [x.new_empty(chunks + 1 if keep == 1 else -(-chunks // size), *x.shape) for x in stacks] if keep else []
        token = lambda x: q.new_empty(chunks, batch * heads, b, x.shape[2])  # noqa: E731
        hidden = [token(x) for x in stacks] if hidden_kept else []
        asked = [token(x) for x in stacks] if hidden_kept else []
        for group, (first, times) in enumerate(_groups(chunks, size, b)):
            eta_, alpha_, real_ = (None if x is None else _chunks(x, times, b) for x in (eta, alpha, real))
            decay = net.decay(_chunks(theta, times, b), eta_, alpha_, real_, options.read == "after")
            span = slice(first, first + decay.mix.shape[0])
            written = work.first(decay.mix.shape[0])
            if hidden_kept:
                written.hidden[:] = [x[span] for x in hidden]
            if keep == 1:
                written.stacks[:] = [store[first : span.stop + 1] for store in kept]
            if keep != 1 or first == 0:
                for buffer, stack in zip(written.stacks, stacks):
                    buffer[0] = stack
            own = anchor if first == 0 else None
            net.advance(_chunks(k, times, b), _chunks(v, times, b), decay, written, own)
            if keep > 1:
                for store, buffer in zip(kept, written.stacks):
                    store[group] = buffer[0]
            _scatter(y, net.read(_chunks(q, times, b), decay, written, [x[span] for x in asked])[0], times, b)
            stacks = [buffer[-1] for buffer in written.stacks]
        if keep:
            ctx.save_for_backward(q, k, v, theta, eta, alpha, gain, *hidden, *asked, *state[s * layers :], *kept)
            ctx.options, ctx.network, ctx.layers, ctx.real, ctx.size = options, network, layers, real, size
            ctx.all_kept, ctx.hidden_kept = keep == 1, hidden_kept
        scratch.release()
        final = [stack[:, part].clone().unflatten(0, (batch, heads)) for part in range(s) for stack in stacks]
        return (y, *final)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *grad_state: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grad_y.device.type):
            return _backward(ctx, grad_y, *grad_state)


def _backward(ctx: Any, grad_y: Tensor, *grad_state: Tensor) -> tuple[Tensor | None, ...]:
    options, layers, size = ctx.options, ctx.layers, ctx.size
    b, clip = options.chunk, options.clip
    q, k, v, theta, eta, alpha, gain, *rest = ctx.saved_tensors
    hidden, asked = (rest[:layers], rest[layers : 2 * layers]) if ctx.hidden_kept else ([], [])
    kept = rest[-layers:]
    anchor = [_rows(w) for w in rest[2 * layers if ctx.hidden_kept else 0 : -layers]] or None
    batch, time, heads, _ = q.shape
    s = 1 if eta is None else 2
    chunks = time // b
    scratch = Scratch.of(q)
    gain_rows = None if gain is None else per_row(gain, batch)
    net = ctx.network(options.activation, gain_rows, clip, scratch)
    work = Work.allocate(size, batch * heads, b, kept, scratch, pulled=True, clipped=clip is not None)
    adjoint = Adjoint.allocate(work, scratch)

    grads = Tokens(q, k, v, theta, eta, alpha).map(lambda x: x.new_empty(x.shape))
    grad_gain: Any = None if net.gain is None else torch.zeros_like(net.gain)
    grad_anchor = [torch.zeros_like(w) for w in anchor] if anchor else None
    grad_end = [torch.stack([_rows(grad_state[l + part * layers]) for part in range(s)], dim=1) for l in range(layers)]
    for group, (first, times) in reversed(list(enumerate(_groups(chunks, size, b)))):
        with torch.enable_grad():
            gates: list[Any] = [
                None if x is None else _chunks(x, times, b).requires_grad_() for x in (theta, eta, alpha)
            ]
            graph = net.decay(gates[0], gates[1], gates[2], _chunks(ctx.real, times, b), options.read == "after")
        decay = ChunkDecay(*(x.detach() for x in graph))
        keys, values, queries = (_chunks(x, times, b) for x in (k, v, q))
        own = anchor if first == 0 else None
        written, grad = work.first(len(keys)), adjoint.first(len(keys))
        for buffer, end in zip(grad.stacks, grad_end):
            buffer[-1] = end  # before anything else: it may lie in the first place of these same buffers
        span = slice(first, first + len(keys))
        if ctx.hidden_kept:
            for buffer, store in zip(written.hidden, hidden):
                buffer.copy_(store[span])
        if ctx.all_kept:
            written.stacks[:] = [store[span] for store in kept]
            net.recall(keys, values, written, own, hidden_known=ctx.hidden_kept)
        else:
            for buffer, store in zip(written.stacks, kept):
                buffer[0] = store[group]
            net.advance(keys, values, decay, written, own)
        if ctx.hidden_kept:
            reading = [x[span] for x in asked]
        else:
            reading = [net.scratch(f"asked {l}", *x.shape) for l, x in enumerate(written.hidden)]
            net.read(queries, decay, written, reading)
        grad_read = net.read_backward(_chunks(grad_y, times, b), queries, decay, written, reading, grad)
        grad_write = net.write_backward(keys, values, decay, written, grad, own, grad_anchor if own else None)
        grad_end = [buffer[0] for buffer in grad.stacks]

        for x, value in ((grads.q, grad_read.queries), (grads.k, grad.inputs[0]), (grads.v, grad_write.values)):
            _scatter(x, value, times, b)
        reached = [
            (x, g)
            for x, g in zip(graph, (grad_read.read, grad_read.carry, grad_write.write, grad_write.mix))
            if x.requires_grad
        ]
        wanted = [x for x in gates if x is not None]
        pulled = iter(torch.autograd.grad([x for x, _ in reached], wanted, [g for _, g in reached]))
        for gate in (grads.theta, grads.eta, grads.alpha):
            if gate is not None:
                _scatter(gate, next(pulled), times, b)
        if grad_read.gain is not None and grad_write.gain is not None:
            grad_gain += grad_read.gain + grad_write.gain
    scratch.release()
    state = [stack[:, part].clone() for part in range(s) for stack in grad_end] + (grad_anchor or [])
    if grad_gain is not None:
        grad_gain = grad_gain.view(batch, heads, -1).sum(0)
    return (None, None, None, None, *grads, grad_gain, *(x.unflatten(0, (batch, heads)) for x in state))


# ---------------------------------------------------------------------------------------------------------------
# Layout: [batch, time, heads, d] <-> [chunks, rows, b, d]


def _fitting(chunks: int, state_bytes: int) -> int:
    """Chunks between kept states: all are kept while they fit ``KEPT_BYTES``, else one in 8, 16, 32, ..."""
    if chunks * state_bytes <= KEPT_BYTES:
        return 1
    keep = GROUP
    while chunks * state_bytes > keep * KEPT_BYTES:
        keep *= 2
    return keep


def _groups(chunks: int, size: int, b: int) -> list[tuple[int, slice]]:
    """The first chunk, and the tokens, of every group."""
    return [(first, slice(first * b, min(first + size, chunks) * b)) for first in range(0, chunks, size)]


def _view(x: Tensor, times: slice, b: int) -> Tensor:
    return x[:, times].unflatten(1, (-1, b)).movedim(3, 1).movedim(2, 0)


@overload
def _chunks(x: Tensor, times: slice, b: int) -> Tensor: ...
@overload
def _chunks(x: None, times: slice, b: int) -> None: ...
def _chunks(x: Tensor | None, times: slice, b: int) -> Tensor | None:
    """``[batch, time, heads, ...]`` -> the group's ``[chunks, rows, b, ...]``, detached and contiguous."""
    return None if x is None else _view(x.detach(), times, b).contiguous().flatten(1, 2)


def _scatter(x: Tensor, group: Tensor, times: slice, b: int) -> None:
    """The inverse: the group's values into their place in ``x``."""
    view = _view(x, times, b)
    view.copy_(group.view(view.shape))


def _rows(w: Tensor) -> Tensor:
    """``[batch, heads, ...]`` -> ``[rows, ...]``, contiguous: a network may know no strides."""
    return w.reshape(-1, *w.shape[2:]).contiguous()
