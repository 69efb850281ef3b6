"""The fast torch path: the chunkwise form with its own backward, for any device, best on a CPU.

The story. Tokens stand as ``[chunks, rows, b, d]`` (a row is a batch row and a head) and are worked on a group of
chunks at a time. Per layer the state is one stack ``[rows, s, out, in]``: weights, and below them momentum.

* Writing goes chunk by chunk, because each chunk's gradients are taken at the weights it starts from: keys forward,
  errors back, and the state on by one product with the gates (``mix``) and one with the errors.
* Reading then answers all queries of the group at once, in large batched products.
* Backward walks the groups from the last to the first. From the states at chunk starts, which were kept or are
  computed again from the one at the group's start, everything else is recomputed; reads are differentiated in one
  batch, writes chunk by chunk in reverse. A write contains a gradient, so its backward is of second order.

Errors ``d`` are half gradients; the factor 2 lives in the decay matrices. Work buffers are allocated once a call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .activation import ACTIVATIONS, Activation
from .decay import ChunkDecay, chunk_decay

EPS = 1e-6
GROUP = 8
"""Chunks worked on together: enough for large products, few enough that their work stays near the cache."""
KEPT_BYTES = 160 * 2**20
"""Every chunk's starting state is kept for backward up to this size (beyond it one in ``GROUP`` or fewer), and so are
the network's hidden values (beyond it they are recomputed)."""


HELD_BYTES = 128 * 2**20
"""Work buffers up to this size wait for the next call."""


class Plan(NamedTuple):
    """What a call computes, apart from its tensors."""

    chunk: int
    activation: str
    clip: float | None
    read_after: bool
    keep: int | None
    """Chunks from one state that is kept for backward to the next; ``None``: as few as ``KEPT_BYTES`` allows."""


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
        real: ``[batch, time, heads]`` of 0 and 1, or ``None``: 0 at slots without a token, whose gates are the identity.

    Returns:
        ``y`` ``[batch, time, heads, d_out]``, final weights, final momentum.
    """
    layers = len(weights)
    outputs = _Chunkwise.apply(plan, layers, real, q, k, v, theta, eta, alpha, gain, *weights, *momentum, *(anchor or ()))
    return outputs[0], outputs[1 : 1 + layers], outputs[1 + layers :]


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, layers: int, real, q, k, v, theta, eta, alpha, gain, *state):  # type: ignore[override]
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
        scratch = _Scratch.of(q)
        net = _Network(ACTIVATIONS[plan.activation], _per_row(gain, batch), plan.clip, scratch)
        work = _Work.allocate(size, batch * heads, plan.chunk, stacks, scratch, pulled=False, clipped=plan.clip is not None)
        # where every state is kept, the states are advanced in the place they are kept at
        kept = [x.new_empty(chunks + 1 if keep == 1 else -(-chunks // size), *x.shape) for x in stacks] if keep else []
        token = lambda x: q.new_empty(chunks, batch * heads, plan.chunk, x.shape[2])  # noqa: E731
        hidden = [token(x) for x in stacks] if hidden_kept else []
        asked = [token(x) for x in stacks] if hidden_kept else []
        for group, (first, tokens) in enumerate(_groups(chunks, size, plan.chunk)):
            decay = chunk_decay(*(_chunks(x, tokens, plan) for x in (theta, eta, alpha, real)), plan.read_after)
            span = slice(first, first + decay.mix.shape[0])
            written = work.first(decay.mix.shape[0])
            if hidden_kept:
                written.hidden[:] = [x[span] for x in hidden]
            if keep == 1:
                written.stacks[:] = [store[first : span.stop + 1] for store in kept]
            if keep != 1 or first == 0:
                for buffer, stack in zip(written.stacks, stacks):
                    buffer[0] = stack
            net.advance(_chunks(k, tokens, plan), _chunks(v, tokens, plan), decay, written, anchor if first == 0 else None)
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
    def backward(ctx: Any, grad_y: Tensor, *grad_state: Tensor):  # type: ignore[override]
        plan, layers, size = ctx.plan, ctx.layers, ctx.size
        q, k, v, theta, eta, alpha, gain, *rest = ctx.saved_tensors
        hidden, asked = (rest[:layers], rest[layers : 2 * layers]) if ctx.hidden_kept else ([], [])
        kept = rest[-layers:]
        anchor = [_rows(w) for w in rest[2 * layers if ctx.hidden_kept else 0 : -layers]] or None
        batch, time, heads, _ = q.shape
        s = 1 if eta is None else 2
        chunks = time // plan.chunk
        scratch = _Scratch.of(q)
        net = _Network(ACTIVATIONS[plan.activation], _per_row(gain, batch), plan.clip, scratch)
        work = _Work.allocate(size, batch * heads, plan.chunk, kept, scratch, pulled=True, clipped=plan.clip is not None)
        adjoint = _Adjoint.allocate(work, scratch)

        inputs = dict(q=q, k=k, v=v, theta=theta, eta=eta, alpha=alpha)
        grads = {name: None if x is None else x.new_empty(x.shape) for name, x in inputs.items()}
        grad_gain = None if net.gain is None else torch.zeros_like(net.gain)
        grad_anchor = [torch.zeros_like(w) for w in anchor] if anchor else None
        grad_end = [torch.stack([_rows(grad_state[l + part * layers]) for part in range(s)], dim=1) for l in range(layers)]
        for group, (first, tokens) in reversed(list(enumerate(_groups(chunks, size, plan.chunk)))):
            with torch.enable_grad():
                gates = [None if x is None else _chunks(x, tokens, plan).requires_grad_() for x in (theta, eta, alpha)]
                graph = chunk_decay(*gates, _chunks(ctx.real, tokens, plan), plan.read_after)
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
            if grad_gain is not None:
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


def _chunks(x: Tensor | None, tokens: slice, plan: Plan) -> Tensor | None:
    """``[batch, time, heads, ...]`` -> the group's ``[chunks, rows, b, ...]``, detached and contiguous."""
    return None if x is None else _view(x.detach(), tokens, plan).contiguous().flatten(1, 2)


def _scatter(x: Tensor, group: Tensor, tokens: slice, plan: Plan) -> None:
    """The inverse: the group's values into their place in ``x``."""
    view = _view(x, tokens, plan)
    view.copy_(group.view(view.shape))


def _rows(w: Tensor) -> Tensor:
    return w.reshape(-1, *w.shape[2:])


def _per_row(gain: Tensor | None, batch: int) -> Tensor | None:
    """``[heads, d] -> [rows, 1, d]``."""
    return None if gain is None else gain.repeat(batch, 1).unsqueeze(1)


# ---------------------------------------------------------------------------------------------------------------
# Work buffers; lists run over layers


class _Work(NamedTuple):
    """What writing a group leaves behind for its reads and its backward."""

    stacks: list[Tensor]
    """State at every chunk start and at the end: ``[chunks + 1, rows, s, out, in]``."""
    inputs: list[Tensor]
    """``a_l``: ``[chunks, rows, b, in]``; the first is the keys themselves and is set by the writer."""
    hidden: list[Tensor]
    """``z_l`` before the activation, and the last layer's output: ``[chunks, rows, b, out]``."""
    pulled: list[Tensor]
    """``d_{l+1} W_{l+1}``, before the slope at ``z_l``: layers below the last; kept for backward only."""
    raw: list[Tensor]
    """``d_l`` before clipping: ``[chunks, rows, b, out]``; the same tensors as ``errors`` where nothing is clipped."""
    errors: list[Tensor]
    """``d_l``."""

    @classmethod
    def allocate(
        cls, chunks: int, rows: int, b: int, stacks: Sequence[Tensor], scratch: _Scratch, *, pulled: bool, clipped: bool
    ) -> _Work:
        shapes = [stack.shape[-3:] for stack in stacks]
        token = lambda name, l, width: scratch(f"{name} {l}", chunks, rows, b, width)  # noqa: E731
        outs = list(enumerate(out for _, out, _ in shapes))
        raw = [token("raw", l, out) for l, out in outs]
        return cls(
            [scratch(f"stack {l}", chunks + 1, rows, *shape) for l, shape in enumerate(shapes)],
            [token("input", l, width) for l, (_, _, width) in enumerate(shapes)],
            [token("hidden", l, out) for l, out in outs],
            [token("pulled", l, out) for l, out in outs[:-1]] if pulled else [],
            raw,
            [token("error", l, out) for l, out in outs] if clipped else raw,
        )

    def first(self, chunks: int) -> _Work:
        """The same buffers for a group of ``chunks`` chunks."""
        raw = [x[:chunks] for x in self.raw]
        errors = raw if self.errors is self.raw else [x[:chunks] for x in self.errors]
        short = [[x[:chunks] for x in part] for part in (self.inputs, self.hidden, self.pulled)]
        return _Work([x[: chunks + 1] for x in self.stacks], *short, raw, errors)

    def at(self, i: int | slice) -> _Work:
        """Chunk ``i``, or several as one batch of ``chunks * rows``; stacks are those at chunk starts."""
        pick = (lambda x: x[i]) if isinstance(i, int) else (lambda x: x[i].flatten(0, 1))
        raw = [pick(x) for x in self.raw]
        errors = raw if self.errors is self.raw else [pick(x) for x in self.errors]
        parts = [[pick(x) for x in part] for part in (self.inputs, self.hidden, self.pulled)]
        chunks = len(self.raw[0])
        return _Work([pick(x[:chunks]) for x in self.stacks], *parts, raw, errors)


class _Adjoint(NamedTuple):
    """Gradients of a group's stacks, inputs and errors; reads fill them, writes add to them."""

    stacks: list[Tensor]
    inputs: list[Tensor]
    errors: list[Tensor]

    @classmethod
    def allocate(cls, work: _Work, scratch: _Scratch) -> _Adjoint:
        like = lambda name, part: [scratch(f"grad {name} {l}", *x.shape) for l, x in enumerate(part)]  # noqa: E731
        return cls(like("stack", work.stacks), like("input", work.inputs), like("error", work.errors))

    def first(self, chunks: int) -> _Adjoint:
        short = [[x[:chunks] for x in part] for part in (self.inputs, self.errors)]
        return _Adjoint([x[: chunks + 1] for x in self.stacks], *short)


class _Scratch:
    """Named temporaries that outlive a call: a fresh page costs more than the arithmetic done on it."""

    _local = threading.local()

    def __init__(self, like: Tensor) -> None:
        self._options = dict(dtype=like.dtype, device=like.device)
        self._buffers: dict[str, Tensor] = {}

    @classmethod
    def of(cls, like: Tensor) -> _Scratch:
        """This thread's temporaries in the dtype and on the device of ``like``."""
        known = cls._local.__dict__.setdefault("known", {})
        key = (like.dtype, like.device)
        if key not in known:
            known[key] = cls(like)
        return known[key]

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor; the next call with this name reuses its memory."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = self._buffers[name] = torch.empty(size, **self._options)
        return buffer[:size].view(shape)

    def release(self) -> None:
        """The call is over: what is larger than ``HELD_BYTES`` is given back."""
        if sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values()) > HELD_BYTES:
            self._buffers.clear()


class _ReadGrad(NamedTuple):
    queries: Tensor
    read: Tensor
    carry: Tensor
    gain: Tensor | None


class _WriteGrad(NamedTuple):
    values: Tensor
    write: Tensor
    mix: Tensor
    gain: Tensor | None


# ---------------------------------------------------------------------------------------------------------------


class _Network:
    """The memory network ``M``; ``gain`` ``[rows, 1, d]`` is given when ``M(x) = x + LN(net(x)) * gain``."""

    def __init__(self, activation: Activation, gain: Tensor | None, clip: float | None, scratch: _Scratch) -> None:
        self.activation, self.gain, self.clip, self.scratch = activation, gain, clip, scratch

    # -- write ---------------------------------------------------------------------------------------------------

    def advance(self, keys: Tensor, values: Tensor, decay: ChunkDecay, written: _Work, anchor: list[Tensor] | None) -> None:
        """Write chunk after chunk, from ``written.stacks[l][0]`` on; fills everything in ``written``."""
        written.inputs[0] = keys
        for i in range(len(keys)):
            now = written.at(i)
            weights = anchor if i == 0 and anchor is not None else [stack[:, 0] for stack in now.stacks]
            self._differentiate(values[i], weights, now, self.gain)
            for buffer, stack, a, d in zip(written.stacks, now.stacks, now.inputs, now.errors):
                after = buffer[i + 1]
                torch.bmm(decay.mix[i], stack.flatten(2), out=after.flatten(2))
                weighed = self._spread(decay.write[i], d, "weighed")
                after.flatten(1, 2).baddbmm_(weighed.mT, a, alpha=-1)

    def _spread(self, coefficients: Tensor, x: Tensor, name: str) -> Tensor:
        """``[..., b, s]`` times ``[..., b, out]`` -> ``[..., b, s * out]``."""
        parts = coefficients.shape[-1]
        spread = self.scratch(name, *x.shape[:-1], parts, x.shape[-1])
        return torch.mul(coefficients.unsqueeze(-1), x.unsqueeze(-2), out=spread).flatten(-2)

    def recall(self, keys: Tensor, values: Tensor, written: _Work, anchor: list[Tensor] | None, hidden_known: bool) -> None:
        """What ``advance`` fills, in one batch, given the state at every chunk start (and perhaps ``hidden``)."""
        written.inputs[0] = keys
        if anchor is not None:
            self._differentiate(values[0], anchor, written.at(0), self.gain, hidden_known)
        rest = slice(0 if anchor is None else 1, None)
        if len(keys[rest]):
            batch = written.at(rest)
            gain = None if self.gain is None else self.gain.repeat(len(keys[rest]), 1, 1)
            self._differentiate(values[rest].flatten(0, 1), [stack[:, 0] for stack in batch.stacks], batch, gain, hidden_known)

    def _differentiate(
        self, values: Tensor, weights: list[Tensor], work: _Work, gain: Tensor | None, hidden_known: bool = False
    ) -> None:
        """Keys forward through ``weights``, half errors back; fills ``work`` apart from its stacks."""
        last = len(weights) - 1
        for l, weight in enumerate(weights):
            if l:
                self.activation.value(work.hidden[l - 1], out=work.inputs[l])
            if not hidden_known:
                torch.bmm(work.inputs[l], weight.mT, out=work.hidden[l])
        z = work.hidden[last]
        if gain is None:
            torch.sub(z, values, out=work.raw[last])
        else:
            n, _, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
            g = torch.addcmul(work.inputs[0], n, gain).sub_(values).mul_(gain)
            work.raw[last].copy_(layer_norm_pull(g, n, inverse))
        for l in range(last - 1, -1, -1):
            e = work.pulled[l] if work.pulled else self.scratch("pulled", *work.raw[l].shape)
            torch.bmm(work.raw[l + 1], weights[l + 1], out=e)
            self.activation.pull(e, work.hidden[l], out=work.raw[l])
        if self.clip is not None:
            scale = self._scale(work.raw, work.inputs)[0].unsqueeze(-1)
            for raw, error in zip(work.raw, work.errors):
                torch.mul(raw, scale, out=error)

    def _scale(self, errors: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Per token, what brings the surprise's norm (the full gradient's) down to ``clip``."""
        assert self.clip is not None
        error_squares = [square_sum(x) for x in errors]
        input_squares = [square_sum(x) for x in inputs]
        square = sum(d * a for d, a in zip(error_squares, input_squares)) * 4
        return self.clip / square.sqrt().clamp_(min=self.clip), square, error_squares, input_squares

    # -- read ----------------------------------------------------------------------------------------------------

    def read(self, queries: Tensor, decay: ChunkDecay, written: _Work, asked: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """All of the group's queries, each at the weights its token left (or found).

        ``asked``: where each layer's ``Z_l`` ``[chunks, rows, b, out]`` is wanted, or ``[]``.
        """
        work = written.at(slice(None))
        weigh, carry = decay.read.flatten(0, 1), decay.carry.flatten(0, 1)
        x = queries.flatten(0, 1)
        new = lambda name, width: self.scratch(name, *x.shape[:2], width)  # noqa: E731
        for l, (stack, a, d) in enumerate(zip(work.stacks, work.inputs, work.errors)):
            s, out, width = stack.shape[1:]
            if l:
                x = self.activation.value(z, out=new("x", width))
            z = asked[l].flatten(0, 1) if asked else new(f"z {l % 2}", out)
            if width < out:
                # what the state's parts weigh is multiplied in where the layer is narrow
                for part in range(s):
                    weighed = torch.mul(x, carry[..., part : part + 1], out=new("weighed x", width))
                    torch.baddbmm(z, weighed, stack[:, part].mT, beta=min(part, 1), out=z)
            else:
                carried = torch.bmm(x, stack.flatten(1, 2).mT, out=new("carried", s * out)).unflatten(-1, (s, out))
                torch.mul(carried[:, :, 0], carry[..., :1], out=z)
                if s == 2:
                    z.addcmul_(carried[:, :, 1], carry[..., 1:])
            scores = torch.bmm(x, a.mT, out=new("scores", x.shape[1])).mul_(weigh)
            z.baddbmm_(scores, d, alpha=-1)
        y = z.view(queries.shape[:-1] + z.shape[-1:])
        if self.gain is None:
            return (y.clone() if asked else y), asked
        return torch.addcmul(queries, torch.native_layer_norm(y, y.shape[-1:], None, None, EPS)[0], self.gain), asked

    def read_backward(self, grad_y, queries, decay: ChunkDecay, written: _Work, asked: list[Tensor], grad: _Adjoint) -> _ReadGrad:
        """Fills ``grad`` (its last stack apart), given each layer's ``Z_l``."""
        work = written.at(slice(None))
        weigh, carry = decay.read.flatten(0, 1), decay.carry.flatten(0, 1)
        g, grad_gain = grad_y, None
        if self.gain is not None:
            z = asked[-1]
            n, _, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
            grad_gain = (grad_y * n).sum((0, 2)).unsqueeze(1)
            g = layer_norm_pull(grad_y * self.gain, n, inverse)
        g = g.flatten(0, 1)
        grad_weigh, grad_carry = torch.zeros_like(weigh), torch.zeros_like(carry)
        for l in range(len(work.stacks) - 1, -1, -1):
            stack, a, d = work.stacks[l], work.inputs[l], work.errors[l]
            z = asked[l - 1].flatten(0, 1) if l else queries.flatten(0, 1)
            x = self.activation.value(z, out=self.scratch("x", *z.shape)) if l else z
            spread = self._spread(carry, g, "spread")
            torch.bmm(spread.mT, x, out=grad.stacks[l][:-1].flatten(0, 1).flatten(1, 2))
            grad_x = self.scratch(f"grad x {l % 2}", *x.shape)
            for part in range(stack.shape[1]):
                back = torch.bmm(g, stack[:, part], out=self.scratch("back", *x.shape))
                grad_carry[..., part] += torch.mul(x, back, out=self.scratch("felt", *x.shape)).sum(-1)
                if part:
                    grad_x.addcmul_(back, carry[..., part : part + 1])
                else:
                    torch.mul(back, carry[..., :1], out=grad_x)
            scores = torch.bmm(x, a.mT, out=self.scratch("scores", *weigh.shape))
            grad_decayed = torch.bmm(g, d.mT, out=self.scratch("decayed", *weigh.shape)).neg_()
            grad_weigh.addcmul_(grad_decayed, scores)
            torch.bmm(scores.mul_(weigh).mT, g, out=grad.errors[l].flatten(0, 1)).neg_()
            grad_scores = grad_decayed.mul_(weigh)
            torch.bmm(grad_scores.mT, x, out=grad.inputs[l].flatten(0, 1))
            grad_x.baddbmm_(grad_scores, a)
            g = self.activation.pull(grad_x, z, out=self.scratch("pulled", *z.shape)) if l else grad_x
        g = g.view(queries.shape)
        if self.gain is not None:
            g += grad_y
        return _ReadGrad(g, grad_weigh.view(decay.read.shape), grad_carry.view(decay.carry.shape), grad_gain)

    # -- backward of write -----------------------------------------------------------------------------------------

    def write_backward(self, keys, values, decay: ChunkDecay, written: _Work, grad: _Adjoint, anchor, grad_anchor) -> _WriteGrad:
        """Chunk by chunk in reverse, from the gradient of the state after the group in ``grad.stacks[l][-1]``.

        On return ``grad.stacks[l][0]`` is the gradient of the state before the group and ``grad.inputs[0]`` that of
        the keys. Adds to ``grad_anchor`` where the first chunk has an anchor of its own.
        """
        layers, s = len(written.stacks), decay.mix.shape[-1]
        grad_gain = None if self.gain is None else torch.zeros_like(self.gain)
        grad_values = torch.empty_like(values)
        weighed = [self._spread(decay.write, d, f"weighed {l}") for l, d in enumerate(written.errors)]
        back = [self.scratch(f"back {l}", *x.shape) for l, x in enumerate(weighed)]
        # z_l is needed no more once its slope and curvature are known, nor is what was pulled
        slopes: list[Tensor | None] = [None] * (layers - 1)
        curvatures: list[Tensor | None] = [None] * (layers - 1)
        for l, (z, pulled) in enumerate(zip(written.hidden, written.pulled)):
            if self.activation.second is not None:
                curvatures[l] = pulled.mul_(self.activation.second(z, self.scratch("second", *z.shape), self.scratch("square", *z.shape)))
            slopes[l] = self.activation.pull(self.scratch("second", *z.shape).fill_(1), z, out=z)
        write = decay.write.unsqueeze(-1)
        for i in range(len(keys) - 1, -1, -1):
            own = anchor is not None and i == 0
            now = written.at(i)
            weights = anchor if own else [stack[:, 0] for stack in now.stacks]
            before = [buffer[i] for buffer in grad.stacks]
            onto = grad_anchor if own else [x[:, 0] for x in before]
            grad_inputs, grad_errors = [x[i] for x in grad.inputs], [x[i] for x in grad.errors]
            for l in range(layers):
                later = grad.stacks[l][i + 1]
                torch.bmm(now.inputs[l], later.flatten(1, 2).mT, out=back[l][i])
                for part, felt in enumerate(back[l][i].unflatten(-1, (s, -1)).unbind(2)):
                    grad_errors[l].addcmul_(felt, write[i, :, :, part], value=-1)
                grad_inputs[l].baddbmm_(weighed[l][i], later.flatten(1, 2), alpha=-1)
                before[l].flatten(2).baddbmm_(decay.mix[i].mT, later.flatten(2))
            if self.clip is not None:
                self._clip_backward(now, grad_errors, grad_inputs)

            # errors run down the layers, so their gradient runs up ...
            below: list[Tensor | None] = [None] * (layers - 1)
            pushed: list[Tensor] = []
            for l in range(layers - 1):
                g = grad_errors[l]
                below[l] = None if curvatures[l] is None else torch.mul(g, curvatures[l][i], out=self.scratch(f"below {l}", *g.shape))
                pushed.append(g.mul_(slopes[l][i]))
                grad_errors[l + 1].baddbmm_(pushed[-1], weights[l + 1].mT)
            # ... and then the inputs' gradient runs down
            g = grad_errors[-1]
            if self.gain is not None:
                g = self._error_backward(
                    keys[i], values[i], now.hidden[-1], now.raw[-1], g, grad_inputs[0], grad_gain, grad_values[i]
                )
            for l in range(layers - 1, -1, -1):
                if l < layers - 1:
                    g = grad_inputs[l + 1].mul_(slopes[l][i])
                    if below[l] is not None:
                        g += below[l]
                both = torch.bmm(g.mT, now.inputs[l], out=self.scratch("both", *weights[l].shape))
                if l:
                    both.baddbmm_(now.raw[l].mT, pushed[l - 1])
                onto[l].add_(both)
                grad_inputs[l].baddbmm_(g, weights[l])
        if self.gain is None:
            torch.neg(grad.errors[-1], out=grad_values)
        grad_write, grad_mix = torch.zeros_like(decay.write), torch.zeros_like(decay.mix)
        for l in range(layers):
            grad_write -= back[l].unflatten(-1, (s, -1)).mul_(written.errors[l].unsqueeze(3)).sum(-1)
            later, start = grad.stacks[l][1:].flatten(3).flatten(0, 1), written.stacks[l][: len(keys)].flatten(3).flatten(0, 1)
            grad_mix.flatten(0, 1).baddbmm_(later, start.mT)
        return _WriteGrad(grad_values, grad_write, grad_mix, grad_gain)

    def _clip_backward(self, now: _Work, grad_errors: list[Tensor], grad_inputs: list[Tensor]) -> None:
        """Through ``d = scale * raw`` with ``scale = clip / |surprise|`` where that is below one."""
        scale, square, error_squares, input_squares = self._scale(now.raw, now.inputs)
        grad_scale = sum((g * d).sum(-1) for g, d in zip(grad_errors, now.raw))
        # d scale / d square = -scale / (2 square), and square is 4 sum |d|^2 |a|^2
        grad_square = torch.where(scale < 1, -4 * grad_scale * scale / square, torch.zeros_like(scale))
        for g, h, d, a, dd, aa in zip(grad_errors, grad_inputs, now.raw, now.inputs, error_squares, input_squares):
            g.mul_(scale.unsqueeze(-1)).addcmul_(d, (grad_square * aa).unsqueeze(-1))
            h.addcmul_(a, (grad_square * dd).unsqueeze(-1))

    def _error_backward(self, key, value, z, error, g, grad_key, grad_gain, grad_value) -> Tensor:
        """From the error ``J ((M(k) - v) * gain)`` to the last layer's output (returned), key, value and gain.

        ``J = (I - 1 1^T / d - n n^T / d) / sigma`` is LayerNorm's Jacobian at ``z``; it is symmetric.
        """
        gain = self.gain
        n, _, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
        miss = torch.addcmul(key, n, gain).sub_(value)
        pushed = miss * gain
        grad_pushed = layer_norm_pull(g, n, inverse)
        grad_miss = torch.mul(grad_pushed, gain, out=grad_value)
        p = g * inverse
        # the error depends on z through the inner n, through the n of its own projection, and through 1 / sigma
        grad_n = grad_miss * gain
        grad_n.addcmul_(p, (pushed * n).mean(-1, keepdim=True), value=-1)
        grad_n.addcmul_(pushed, (p * n).mean(-1, keepdim=True), value=-1)
        grad_gain += (grad_pushed * miss).addcmul_(grad_miss, n).sum(1, keepdim=True)
        grad_key += grad_miss
        grad_value.neg_()
        through_sigma = (p * error).mean(-1, keepdim=True)
        return layer_norm_pull(grad_n, n, inverse).addcmul_(n, through_sigma, value=-1)


def layer_norm_pull(g: Tensor, n: Tensor, inverse: Tensor) -> Tensor:
    """The vector-Jacobian product of ``z -> n = (z - mean) / sigma``; ``inverse`` is ``1 / sigma``.

    The fused backward is given ``n`` itself, of mean 0 and deviation 1: from ``z`` it would lose digits by
    cancellation where sigma is small.
    """
    mask, none = [True, False, False], None
    pulled = torch.ops.aten.native_layer_norm_backward(
        g, n, n.shape[-1:], torch.zeros_like(inverse), torch.ones_like(inverse), none, none, mask
    )[0]
    return pulled.mul_(inverse)


def square_sum(x: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, x)
