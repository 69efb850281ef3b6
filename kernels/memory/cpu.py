"""The memory operation on the C kernels: arguments handed over, results and gradients handed back.

The kernels work on one batch row and head at a time and know of phases and masks, so rows need no lining up here.
What they compute is described in ``network.h``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpu_runtime import library
from ..cpu_runtime.call import empty_huge_pages as fresh
from ..cpu_runtime.call import product_dtype as operands
from ..dispatch import needs_grad as tracks
from .activation import NUMBERS
from .buffers import Scratch
from .state import MemoryState
from .tokens import Options, Tokens

LAYERS = 16
LONGEST = 256
"""Tokens of a chunk beyond which its work leaves a core's cache, and the torch path is as good."""
FARTHEST = 2**24
"""Tokens of a chunk that a kernel's counters hold, a sequence's length on top."""
KEPT_BYTES = 160 * 2**20
"""What is kept for backward: the outputs for the queries where they fit, and as many states as fit beside them."""
KEEPS = (4, 16)
"""Chunks from one kept state to the next, at least and at most: one more costs what it saves in learning again."""
MOST = 1024
"""Chunks that are learned again together at most, whatever was asked for: their work must fit too."""

_SEQUENCES = (*Tokens._fields, "y")
_SIZES = ("batch", "time", "heads", "layers", "chunk", "activation", "momentum", "normed", "after")
_KEPT = ("every", "asked_kept")


class _Sequence(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "time", "head"))]


class _Matrices(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head"))]


_States = (_Matrices * LAYERS) * 3


class _Call(ctypes.Structure):
    """``call`` of memory.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, *_KEPT)),
        ("widths", ctypes.c_int64 * (LAYERS + 1)),
        ("clip", ctypes.c_double),
        *((name, _Sequence) for name in _SEQUENCES),
        *((f"grad_{name}", _Sequence) for name in _SEQUENCES),
        ("gain", ctypes.c_void_p),
        ("grad_gain", ctypes.c_void_p),
        *((name, _States) for name in ("before", "end", "grad_before", "grad_end")),
        *((name, ctypes.c_void_p) for name in ("phase", "order", "count", "kept", "scratch")),
        ("kept_numbers", ctypes.c_int64),
        ("scratch_numbers", ctypes.c_int64),
    ]


class _Plan(NamedTuple):
    """What a call computes, apart from its differentiable tensors."""

    options: Options
    layers: int
    phases: Tensor
    """``[batch]`` int64: where in its chunk each row stands."""
    counts: Tensor
    """``[batch]`` int32: tokens of each row."""
    order: Tensor | None
    """``[batch, time]`` int32: which tokens those are; ``None``: all."""
    anchor_made: bool
    """Whether some row's anchor after the call is neither the weights then nor its anchor before."""
    operands: torch.dtype
    """Of matrix products: what forward's were, backward's are."""


class _Keeping(NamedTuple):
    """What is kept for backward."""

    every: int
    """Chunks from one kept state to the next; 0: nothing is kept."""
    asked: bool
    """Whether the layers' outputs for the queries are."""


def refuse_native(*, chunk: int = 16, time: int = 1, layers: int = 1, **facts: Any) -> str | None:
    """Why the kernel cannot run, or ``None``."""
    if min(chunk, time) > LONGEST:
        return f"takes at most {LONGEST} tokens of a chunk at once, not {min(chunk, time)}"
    if layers > LAYERS:
        return f"takes at most {LAYERS} layers, not {layers}"
    if chunk > FARTHEST:
        return f"takes chunks of at most {FARTHEST} tokens, not {chunk}"
    return library.refuse(**facts)


def native_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for any length, positions and mask, in float32 or float64 on a CPU."""
    chunk, time = options.chunk, tokens.q.shape[1]
    phases = [position % chunk for position in state.position.tolist()]
    counts, order = [time] * len(phases), None
    if mask is not None and not bool(mask.all()):
        order = torch.argsort(~mask, dim=1, stable=True).to(torch.int32)  # the real tokens of each row come first
        counts = mask.sum(1).tolist()
    if not any(counts):
        return torch.zeros_like(tokens.v), state
    ends = [phase + count for phase, count in zip(phases, counts)]
    all_end = all(count and end % chunk == 0 for count, end in zip(counts, ends))
    none_began = all(not count or (phase and end < chunk) for phase, count, end in zip(phases, counts, ends))
    layers = len(state.weights)
    plan = _Plan(
        options, layers, torch.tensor(phases), torch.tensor(counts, dtype=torch.int32), order,
        not (all_end or none_began), operands(tokens.q.dtype),
    )  # fmt: skip
    momentum = () if tokens.eta is None else state.momentum
    anchor = state.anchor if any(phases) or not all(counts) else ()
    tensors = [*tokens, norm, *state.weights, *momentum, *anchor]
    y, *parts = _Native.apply(plan, *tensors) if tracks(*tensors) else _forward(plan, tensors, record=False)[0]
    weights = tuple(parts[:layers])
    momentum = state.momentum if tokens.eta is None else tuple(parts[layers : 2 * layers])
    anchor = weights if all_end else state.anchor if none_began else tuple(parts[-layers:])
    moved = time if order is None else plan.counts.to(torch.int64)
    return y, MemoryState(weights, momentum, anchor, state.position + moved)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        results, kept, used, ctx.keeping = _forward(plan, tensors, record=True)
        ctx.plan = plan
        ctx.save_for_backward(kept, *used)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_end: Tensor | None) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        kept, *used = ctx.saved_tensors
        # hooks on saved tensors may give them back laid out otherwise
        kept, (tokens, gain, state) = kept.contiguous(), _laid_out(used)
        q = tokens.q
        call = _call(plan, tokens, gain, state)
        call.every, call.asked_kept = ctx.keeping
        call.kept_numbers, call.kept = kept.numel() // max(q.shape[0] * q.shape[2], 1), kept.data_ptr()
        grad_y = torch.zeros_like(tokens.v) if grad_y is None else dense(grad_y, 1)
        call.grad_y = _sequence(grad_y)
        needed = plan.layers * (1 if tokens.eta is None else 2)
        grad_end = tuple(
            (torch.zeros_like(state[i]) if i < needed else None) if g is None else dense(g, 2)
            for i, g in enumerate(grad_end)
        )
        _hand_over(call.grad_end, grad_end, call)
        new = fresh if plan.order is None else torch.zeros
        grads = tokens.map(lambda x: new(x.shape, dtype=x.dtype))
        for name, grad in zip(Tokens._fields, grads):
            setattr(call, f"grad_{name}", _sequence(grad))
        grad_gain = None
        if gain is not None:
            grad_gain = gain.new_empty(q.shape[0], *gain.shape)
            call.grad_gain = grad_gain.data_ptr()
        grad_state = [torch.empty(x.shape, dtype=x.dtype) for x in state]
        _hand_over(call.grad_before, grad_state, call)
        _run(call, q, plan, backward=True)
        return None, *grads, None if grad_gain is None else grad_gain.sum(0), *grad_state


def _forward(
    plan: _Plan, tensors: Sequence[Any], record: bool
) -> tuple[tuple[Tensor, ...], Tensor | None, Sequence[Tensor | None], _Keeping]:
    """``y`` and the state's parts; what backward needs: what was kept, the arguments as they were used, and how."""
    tokens, gain, state = _laid_out(tensors)
    q, v = tokens.q, tokens.v
    call = _call(plan, tokens, gain, state)
    y = (fresh if plan.order is None else torch.zeros)(v.shape, dtype=v.dtype)
    call.y = _sequence(y)
    made = plan.layers * (1 + (tokens.eta is not None) + plan.anchor_made)
    end = [torch.empty(state[i % plan.layers].shape, dtype=q.dtype) for i in range(made)]
    _hand_over(call.end, end, call)
    kept, keeping = None, _Keeping(0, False)
    if record:
        keeping = _keeping(plan, tokens, state)
        call.every, call.asked_kept = keeping
        call.kept_numbers = _room(call, plan, backward=False)[0]
        kept = fresh((q.shape[0] * q.shape[2] * call.kept_numbers,), q.dtype)
        call.kept = kept.data_ptr()
    _run(call, q, plan, backward=False)
    return (y, *end), kept, (*tokens, gain, *state), keeping


def _laid_out(tensors: Sequence[Any]) -> tuple[Tokens, Tensor | None, list[Tensor]]:
    """Tokens, gain and state from all of these in a row, laid out as the kernels take them."""
    q, k, v, theta, eta, alpha, gain, *state = tensors
    tokens = Tokens(dense(q, 1), dense(k, 1), dense(v, 1), theta, eta, alpha)
    return tokens, None if gain is None else gain.contiguous(), [dense(x, 2) for x in state]


def _call(plan: _Plan, tokens: Tokens, gain: Tensor | None, state: Sequence[Tensor]) -> _Call:
    call = _Call()
    chunk, activation, clip, read, *_ = plan.options
    call.batch, call.time, call.heads, call.widths[0] = tokens.q.shape
    call.layers, call.chunk, call.activation = plan.layers, chunk, NUMBERS[activation]
    call.momentum, call.normed, call.after = tokens.eta is not None, gain is not None, read == "after"
    call.clip = clip or 0
    for layer, weight in enumerate(state[: plan.layers]):
        call.widths[layer + 1] = weight.shape[2]
    for name, x in zip(Tokens._fields, tokens):
        setattr(call, name, _sequence(x))
    _hand_over(call.before, state, call)
    call.phase, call.count = plan.phases.data_ptr(), plan.counts.data_ptr()
    call.order = None if plan.order is None else plan.order.data_ptr()
    if gain is not None:
        call.gain = gain.data_ptr()
    return call


def _hand_over(states: Any, tensors: Sequence[Tensor | None], call: _Call) -> None:
    """``tensors`` are weights, momentum if there is any, and perhaps the anchor, layer by layer."""
    for i, x in enumerate(tensors):
        part, layer = divmod(i, call.layers)
        if part and not call.momentum:
            part = 2
        if x is not None:
            states[part][layer] = _Matrices(x.data_ptr(), x.stride(0), x.stride(1))


def _sequence(x: Tensor | None) -> _Sequence:
    return _Sequence() if x is None else _Sequence(x.data_ptr(), *x.stride()[:3])


def dense(x: Tensor, dims: int) -> Tensor:
    """``x`` with its last dimensions dense."""
    stride = x.stride()
    dense = stride[-1] == 1 and (dims == 1 or stride[-2] == x.shape[-1])
    return x if dense else x.contiguous()


def _keeping(plan: _Plan, tokens: Tokens, state: Sequence[Tensor]) -> _Keeping:
    q, keep = tokens.q, plan.options.keep
    batch, time, heads, _ = q.shape
    chunks = -(-time // plan.options.chunk) + 1
    if keep is not None and keep > 1:
        return _Keeping(min(keep, chunks, MOST), False)
    outputs = sum(w.shape[2] for w in state[: plan.layers])
    left = KEPT_BYTES - batch * time * heads * outputs * q.element_size()
    asked = left >= 0
    if keep is not None:
        return _Keeping(keep, asked)
    states = chunks * sum(w.numel() for w in state[: plan.layers]) * (1 if tokens.eta is None else 2) * q.element_size()
    every, most = KEEPS
    while states > left * every and every < most:
        every *= 2
    return _Keeping(every, asked)


def _room(call: _Call, plan: _Plan, backward: bool) -> tuple[int, int]:
    kept, scratch = ctypes.c_int64(), ctypes.c_int64()
    library.library(plan.operands).memory_room(
        ctypes.byref(call), int(backward), ctypes.byref(kept), ctypes.byref(scratch)
    )
    return kept.value, scratch.value


def _run(call: _Call, like: Tensor, plan: _Plan, backward: bool) -> None:
    threads = max(1, min(torch.get_num_threads(), call.batch * call.heads))
    call.scratch_numbers = _room(call, plan, backward)[1]
    scratch = Scratch.of(like)
    call.scratch = scratch("native", threads, call.scratch_numbers).data_ptr()
    library.library(plan.operands).memory_run(ctypes.byref(call), int(backward), threads)
    scratch.release()
