"""A memory of one matrix and chunks of one token in C (``linear_cpu.c``): linear attention, the delta rules.

The recurrence itself, with gradients, and with a decay for the matrix or for each of its input channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import differentiable
from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, empty_huge_pages
from ..dispatch import needs_grad
from .cpu import LONGEST_INTERVAL, dense
from .network_torch import LOSS_NUMBERS
from .reference import reference_memory
from .state import MemoryState, Options, Tokens, where_rows

SEGMENTS = (16, 64)
"""Tokens from one saved state to the next, at least and at most: the states between fit a core's cache."""

# The fields of `call` in linear_cpu.c: batch to saved_numbers; q to grad_y, each an address and three strides; order,
# count and saved; before, end, grad_before and grad_end, each an address and two strides for weights and momentum. The
# doubles are what the loss has.
_run_kernel = Kernel("memory_linear_run", 14 + 14 * 4 + 3 + 8 * 3, 3)


def refuse_linear(*, layers: int = 1, chunk: int = 1, plainly: bool = True, **facts: Any) -> str | None:
    """Why the kernel cannot run, or ``None``. ``plainly``: without a norm, a clip and a threshold."""
    if layers != 1 or chunk != 1 or not plainly:
        return "takes one matrix and chunks of one token, without a norm, a clip and a threshold"
    return library.refuse(**facts)


class _Plan(NamedTuple):
    """A call, apart from its differentiable tensors."""

    options: Options
    mask: Tensor | None
    position: Tensor
    counts: Tensor
    """``[batch]`` int32: each row's tokens that are not masked."""
    order: Tensor | None
    """``[batch, time]`` int32: which tokens those are; ``None``: all."""
    interval: int
    """Tokens of a segment."""


def linear_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for one matrix and chunks of one token, in float32 or float64 on a CPU."""
    batch, time = tokens.q.shape[:2]
    counts, order = torch.full((batch,), time, dtype=torch.int32), None
    if mask is not None and not bool(mask.all()):
        order = torch.argsort(~mask, dim=1, stable=True).to(torch.int32)  # each row's unmasked tokens come first
        counts = mask.sum(1).to(torch.int32)
    low, high = SEGMENTS
    interval = min(options.keep or max(low, min(high, math.isqrt(time))), time, LONGEST_INTERVAL)
    plan = _Plan(options, mask, state.position, counts, order, interval)
    momentum = () if tokens.eta is None else state.momentum
    tensors = [*tokens[:6], *state.weights, *momentum]
    y, *parts = _Linear.apply(plan, *tensors) if needs_grad(*tensors) else _forward(plan, tensors, saves=False)[0]
    weights, momentum = (parts[0],), tuple(parts[1:]) or state.momentum
    anchor = weights if order is None else where_rows(counts > 0, weights, state.anchor)
    return y, MemoryState(weights, momentum, anchor, state.position + counts)


def _formula(ctx: Any, *tensors: Any) -> tuple[Tensor, ...]:
    plan = ctx.plan
    *given, weights = tensors[:7]
    before = MemoryState((weights,), tuple(tensors[7:]), (weights,), plan.position)
    y, after = reference_memory(Tokens(*given), before, None, plan.mask, plan.options)
    return (y, *after.weights, *after.momentum)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Any) -> tuple[Tensor, ...]:
        results, saved = _forward(plan, tensors, saves=True)
        ctx.plan = plan
        ctx.save_for_backward(*tensors, saved)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @differentiable(_formula, first=1)
    def backward(ctx: Any, grad_y: Tensor | None, *grad_end: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        tokens, state = _unpack(tensors)
        grad_y = torch.zeros_like(tokens.v) if grad_y is None else dense(1, [grad_y])[0]
        grad_end = tuple(torch.zeros_like(w) if g is None else dense(2, [g])[0] for w, g in zip(state, grad_end))
        new = empty_huge_pages if ctx.plan.order is None else torch.zeros  # gradients of masked tokens are zero
        grads = tokens.map(lambda x: new(x.shape, dtype=x.dtype))
        grad_state = [torch.empty(w.shape, dtype=w.dtype) for w in state]
        _run(ctx.plan, tokens, state, saved.contiguous(), None, (), (*grads[:6], grad_y), grad_state, grad_end)
        return None, *grads[:6], *grad_state


def _forward(plan: _Plan, tensors: Sequence[Any], saves: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """``y`` and the new state; the states that are saved for backward."""
    tokens, state = _unpack(tensors)
    y = (empty_huge_pages if plan.order is None else torch.zeros)(tokens.v.shape, dtype=tokens.v.dtype)
    end, saved = [torch.empty(w.shape, dtype=w.dtype) for w in state], None
    if saves:
        batch, time, heads, _ = tokens.q.shape
        line = 64 // y.element_size()
        out, width = (-(-n // line) * line for n in state[0].shape[2:])
        numbers = (time - 1) // plan.interval * len(state) * out * width
        saved = empty_huge_pages((batch * heads * numbers,), y.dtype)
    _run(plan, tokens, state, saved, y, end)
    return (y, *end), saved


def _unpack(tensors: Sequence[Any]) -> tuple[Tokens, list[Tensor]]:
    """Tokens and state, laid out as the kernel takes them; hooks on saved tensors may change the layout."""
    q, k, v, theta, eta, alpha, *state = tensors
    q, k, v = dense(1, (q, k, v))
    alpha = dense(1, [alpha])[0] if alpha is not None and alpha.dim() == 4 else alpha
    return Tokens(q, k, v, theta, eta, alpha), dense(2, state)


def _run(
    plan: _Plan,
    tokens: Tokens,
    state: Sequence[Tensor],
    saved: Tensor | None,
    y: Tensor | None,
    end: Sequence[Tensor],
    grads: Sequence[Tensor | None] = (None,) * 7,
    grad_state: Sequence[Tensor] = (),
    grad_end: Sequence[Tensor | None] = (),
) -> None:
    """The structure ``call`` of linear_cpu.c, field by field."""
    options, objective = plan.options, plan.options.objective
    batch, time, heads, width = tokens.q.shape
    tasks = batch * heads
    places: list[int] = []
    for x in (*tokens[:6], y, *grads):
        places += (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])
    matrices: list[int] = []
    for part in (state, end, grad_state, grad_end):
        for i in range(2):
            w = part[i] if i < len(part) else None
            matrices += (0, 0, 0) if w is None else (w.data_ptr(), w.stride(0), w.stride(1))
    _run_kernel(
        tokens.q.dtype,
        batch, time, heads, width, tokens.v.shape[3],
        LOSS_NUMBERS[objective.kind, objective.smooth is not None, objective.form], tokens.eta is not None,
        tokens.alpha is not None and tokens.alpha.dim() == 4, options.decay_first, options.read == "after",
        bool(grad_state), max(1, min(torch.get_num_threads(), tasks)), plan.interval,
        0 if saved is None else saved.numel() // max(tasks, 1), *places, address(plan.order), plan.counts.data_ptr(),
        address(saved), *matrices, objective.p, objective.delta, objective.smooth or 0.0,
    )  # fmt: skip
