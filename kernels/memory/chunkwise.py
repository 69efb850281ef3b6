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

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ..precision import full_precision
from .buffers import Adjoint, Scratch, Work
from .chunk_network import ChunkNetwork
from .decay import ChunkDecay, chunk_decay
from .reading import per_row

GROUP = 8
"""Chunks worked on together: enough for large products, few enough that their work stays near the cache."""
KEPT_BYTES = 160 * 2**20
"""Every chunk's starting state is kept for backward up to this size (beyond it one in ``GROUP`` or fewer), and so are
the network's hidden values (beyond it they are recomputed)."""


class Plan(NamedTuple):
    """What a call computes, apart from its tensors."""

    chunk: int
    activation: str
    clip: float | None
    read_after: bool
    keep: int | None
    """Chunks from one state that is kept for backward to the next; ``None``: as few as ``KEPT_BYTES`` allows."""
    network: type[ChunkNetwork] = ChunkNetwork


def chunkwise_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    gain: Tensor | None,
    weights: tuple[Tensor, ...],
    momentum: tuple[Tensor, ...],
    anchor: tuple[Tensor, ...] | None,
    real: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Read and write ``time`` tokens, a multiple of ``plan.chunk``, that start at a chunk boundary.

    Args:
        q, k: ``[batch, time, heads, d_in]``; v: ``[batch, time, heads, d_out]``; gates ``[batch, time, heads]``.
        eta: ``None`` where there is no momentum; alpha: ``None`` where nothing is forgotten.
        gain: ``None`` or ``[heads, d_out]``.
        weights, momentum: ``[batch, heads, out, in]`` per layer; momentum is ``()`` when eta is ``None``.
        anchor: where the *first* chunk takes its gradients; ``None``: at ``weights``.
        real: ``[batch, time, heads]`` of 0 and 1, or ``None``: 0 at slots without a token (identity gates).

    Returns:
        ``y`` ``[batch, time, heads, d_out]``, final weights, final momentum.
    """
    layers = len(weights)
    outputs = _Chunkwise.apply(
        plan, layers, real, q, k, v, theta, eta, alpha, gain, *weights, *momentum, *(anchor or ())
    )
    return outputs[0], outputs[1 : 1 + layers], outputs[1 + layers :]


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        layers: int,
        real: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        theta: Tensor,
        eta: Tensor | None,
        alpha: Tensor | None,
        gain: Tensor | None,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        batch, time, heads, _ = q.shape
        s = 1 if eta is None else 2
        anchor = [_rows(w) for w in state[s * layers :]] or None
        stacks = [torch.stack([_rows(state[l + part * layers]) for part in range(s)], dim=1) for l in range(layers)]
        chunks = time // plan.chunk
        keep, hidden_kept = 0, False
        if any(ctx.needs_input_grad):
            keep = plan.keep or _fitting(chunks, sum(x.numel() * x.element_size() for x in stacks))
            width = sum(x.shape[2] for x in stacks)
            hidden_kept = plan.keep in (None, 1) and 2 * batch * time * heads * width * q.element_size() <= KEPT_BYTES
        size = min(chunks, keep if keep > 1 else GROUP)

        y = q.new_empty(batch, time, heads, v.shape[-1])
        scratch = Scratch.of(q)
        gain_rows = None if gain is None else per_row(gain, batch)
        net = plan.network(plan.activation, gain_rows, plan.clip, scratch)
        work = Work.allocate(
            size, batch * heads, plan.chunk, stacks, scratch, pulled=False, clipped=plan.clip is not None
        )
        # where every state is kept, the states are advanced in the place they are kept at
        kept = [x.new_empty(chunks + 1 if keep == 1 else -(-chunks // size), *x.shape) for x in stacks] if keep else []
        token = lambda x: q.new_empty(chunks, batch * heads, plan.chunk, x.shape[2])  # noqa: E731
        hidden = [token(x) for x in stacks] if hidden_kept else []
        asked = [token(x) for x in stacks] if hidden_kept else []
        for group, (first, tokens) in enumerate(_groups(chunks, size, plan.chunk)):
            eta_, alpha_, real_ = (None if x is None else _chunks(x, tokens, plan) for x in (eta, alpha, real))
            decay = chunk_decay(_chunks(theta, tokens, plan), eta_, alpha_, real_, plan.read_after)
            span = slice(first, first + decay.mix.shape[0])
            written = work.first(decay.mix.shape[0])
            if hidden_kept:
                written.hidden[:] = [x[span] for x in hidden]
            if keep == 1:
                written.stacks[:] = [store[first : span.stop + 1] for store in kept]
            if keep != 1 or first == 0:
                for buffer, stack in zip(written.stacks, stacks):
                    buffer[0] = stack
            net.advance(
                _chunks(k, tokens, plan), _chunks(v, tokens, plan), decay, written, anchor if first == 0 else None
            )
            if keep > 1:
                for store, buffer in zip(kept, written.stacks):
                    store[group] = buffer[0]
            _scatter(y, net.read(_chunks(q, tokens, plan), decay, written, [x[span] for x in asked])[0], tokens, plan)
            stacks = [buffer[-1] for buffer in written.stacks]
        if keep:
            ctx.save_for_backward(q, k, v, theta, eta, alpha, gain, *hidden, *asked, *state[s * layers :], *kept)
            ctx.plan, ctx.layers, ctx.real, ctx.size = plan, layers, real, size
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
    plan, layers, size = ctx.plan, ctx.layers, ctx.size
    q, k, v, theta, eta, alpha, gain, *rest = ctx.saved_tensors
    hidden, asked = (rest[:layers], rest[layers : 2 * layers]) if ctx.hidden_kept else ([], [])
    kept = rest[-layers:]
    anchor = [_rows(w) for w in rest[2 * layers if ctx.hidden_kept else 0 : -layers]] or None
    batch, time, heads, _ = q.shape
    s = 1 if eta is None else 2
    chunks = time // plan.chunk
    scratch = Scratch.of(q)
    gain_rows = None if gain is None else per_row(gain, batch)
    net = plan.network(plan.activation, gain_rows, plan.clip, scratch)
    work = Work.allocate(size, batch * heads, plan.chunk, kept, scratch, pulled=True, clipped=plan.clip is not None)
    adjoint = Adjoint.allocate(work, scratch)

    inputs = dict(q=q, k=k, v=v, theta=theta, eta=eta, alpha=alpha)
    grads: dict[str, Any] = {name: None if x is None else x.new_empty(x.shape) for name, x in inputs.items()}
    grad_gain: Any = None if net.gain is None else torch.zeros_like(net.gain)
    grad_anchor = [torch.zeros_like(w) for w in anchor] if anchor else None
    grad_end = [torch.stack([_rows(grad_state[l + part * layers]) for part in range(s)], dim=1) for l in range(layers)]
    for group, (first, tokens) in reversed(list(enumerate(_groups(chunks, size, plan.chunk)))):
        with torch.enable_grad():
            gates: list[Any] = [
                None if x is None else _chunks(x, tokens, plan).requires_grad_() for x in (theta, eta, alpha)
            ]
            graph = chunk_decay(gates[0], gates[1], gates[2], _chunks(ctx.real, tokens, plan), plan.read_after)
        decay = ChunkDecay(*(x.detach() for x in graph))
        keys, values, queries = (_chunks(x, tokens, plan) for x in (k, v, q))
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
        grad_read = net.read_backward(_chunks(grad_y, tokens, plan), queries, decay, written, reading, grad)
        grad_write = net.write_backward(keys, values, decay, written, grad, own, grad_anchor if own else None)
        grad_end = [buffer[0] for buffer in grad.stacks]

        for name, value in (("q", grad_read.queries), ("k", grad.inputs[0]), ("v", grad_write.values)):
            _scatter(grads[name], value, tokens, plan)
        reached = [
            (x, g)
            for x, g in zip(graph, (grad_read.read, grad_read.carry, grad_write.write, grad_write.mix))
            if x.requires_grad
        ]
        wanted = [x for x in gates if x is not None]
        pulled = iter(torch.autograd.grad([x for x, _ in reached], wanted, [g for _, g in reached]))
        for name, x in zip(("theta", "eta", "alpha"), gates):
            if x is not None:
                _scatter(grads[name], next(pulled), tokens, plan)
        if grad_read.gain is not None and grad_write.gain is not None:
            grad_gain += grad_read.gain + grad_write.gain
    scratch.release()
    state = [stack[:, part].clone() for part in range(s) for stack in grad_end] + (grad_anchor or [])
    if grad_gain is not None:
        grad_gain = grad_gain.view(batch, heads, -1).sum(0)
    return (None, None, None, *grads.values(), grad_gain, *(x.unflatten(0, (batch, heads)) for x in state))


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


def _view(x: Tensor, tokens: slice, plan: Plan) -> Tensor:
    return x[:, tokens].unflatten(1, (-1, plan.chunk)).movedim(3, 1).movedim(2, 0)


@overload
def _chunks(x: Tensor, tokens: slice, plan: Plan) -> Tensor: ...
@overload
def _chunks(x: None, tokens: slice, plan: Plan) -> None: ...
def _chunks(x: Tensor | None, tokens: slice, plan: Plan) -> Tensor | None:
    """``[batch, time, heads, ...]`` -> the group's ``[chunks, rows, b, ...]``, detached and contiguous."""
    return None if x is None else _view(x.detach(), tokens, plan).contiguous().flatten(1, 2)


def _scatter(x: Tensor, group: Tensor, tokens: slice, plan: Plan) -> None:
    """The inverse: the group's values into their place in ``x``."""
    view = _view(x, tokens, plan)
    view.copy_(group.view(view.shape))


def _rows(w: Tensor) -> Tensor:
    return w.reshape(-1, *w.shape[2:])
