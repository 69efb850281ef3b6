"""The memory operation and reading on the C kernels (``cpu.c``, ``read_cpu.c``), for many tokens, with gradients.

The kernels work on one batch row and head at a time and handle phases and masks, so rows need no lining up here. The
mathematics is in ``network.h``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import differentiable
from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, empty_huge_pages, product_dtype
from ..dispatch import needs_grad
from .closed_form import closed_form_memory
from .network_torch import ACTIVATION_NUMBERS, LOSS_NUMBERS, READ_NUMBERS, read_formula
from .state import MemoryState, Options, Tokens

_STATE = len(Tokens._fields) + 1
"""Where the state begins in a list of tokens, gain and state."""
LAYERS = 16
LONGEST_CHUNK = 256
"""Tokens of a chunk at once beyond which its work leaves a core's cache, and the torch backend is as fast."""
LARGEST_CHUNK = 2**24
"""Chunk length up to which the kernels' counters hold a position in a chunk plus a sequence's length."""
CHECKPOINT_BYTES = 160 * 2**20
"""Kept for backward: the layers' outputs for the queries if they fit, and as many states as fit beside them."""
CHECKPOINT_INTERVALS = (4, 16)
"""Chunks from one checkpoint to the next, at least and at most: one more costs what it saves in recomputation."""
LONGEST_INTERVAL = 1024
"""Chunks that are recomputed together at most, whatever ``keep`` says: their work must fit too."""

# The fields of `call` in cpu.c, one term each: batch to saved_numbers; widths; q to grad_y, each an address and three
# strides; gain, grad_gain, phase, order, count, end_row and saved; before, end, grad_before and grad_end, each an
# address and two strides for weights, momentum and anchor of every layer. The doubles are clip, and what the loss has.
_memory_run = Kernel("memory_run", 18 + LAYERS + 1 + 18 * 4 + 7 + 4 * 3 * LAYERS * 3, 4)
# In read_cpu.c: batch to threads; widths; q, y, grad_q and grad_y; gain and grad_gain; weights and grad_weights.
_read_run = Kernel("read_run", 7 + LAYERS + 1 + 4 * 4 + 2 + 2 * LAYERS * 3, 0)


def refuse_cpu(*, chunk: int = 16, time: int = 1, **facts: Any) -> str | None:
    """Why the kernel for ``titans_memory`` cannot run, or ``None``."""
    if min(chunk, time) > LONGEST_CHUNK:
        return f"takes at most {LONGEST_CHUNK} tokens of a chunk at once, not {min(chunk, time)}"
    if chunk > LARGEST_CHUNK:
        return f"takes chunks of at most {LARGEST_CHUNK} tokens, not {chunk}"
    return refuse_cpu_read(**facts)


def refuse_cpu_read(*, layers: int = 1, **facts: Any) -> str | None:
    """Why the kernel for ``read_memory`` cannot run, or ``None``."""
    return f"takes at most {LAYERS} layers, not {layers}" if layers > LAYERS else library.refuse(**facts)


# -- titans_memory -----------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """A call, apart from its differentiable tensors."""

    options: Options
    mask: Tensor | None
    position: Tensor
    layers: int
    phases: Tensor
    """``[batch]`` int64: each row's position in its chunk."""
    counts: Tensor
    """``[batch]`` int32: each row's tokens that are not masked."""
    order: Tensor | None
    """``[batch, time]`` int32: which tokens those are, counted from the first that is in a window; ``None``: all."""
    end_rows: Tensor
    """``[batch]`` int32: which row of the state after the call is that of each row; -1: it is not returned."""
    new_anchor: bool
    """Whether some returned row's anchor after the call is neither its weights then nor its anchor before."""
    operands: torch.dtype
    """Of matrix products; backward uses what forward used."""


class Checkpoints(NamedTuple):
    """What forward saves for backward."""

    interval: int = 0
    """Chunks between saved states; 0: nothing is saved."""
    activations: bool = False
    """Whether the layers' outputs for the queries are saved."""


NOTHING_SAVED = Checkpoints()


def cpu_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for any length, positions and mask, in float32 or float64 on a CPU."""
    chunk, time, past = options.chunk, tokens.q.shape[1], options.window - 1
    positions = state.position.tolist()
    counts, order = [time] * len(positions), None
    if mask is not None and not bool(mask.all()):
        order = torch.argsort(~mask, dim=1, stable=True).to(torch.int32)  # each row's unmasked tokens come first
        if past:
            order = torch.cat([torch.arange(past, dtype=torch.int32).expand(len(positions), -1), order + past], 1)
        counts = mask.sum(1).tolist()
    ends = options.ends
    if not any(counts):
        return torch.zeros_like(tokens.like_outputs()), state if ends is None else state.rows(ends)
    phases, all_end, none_began, end_rows = [], True, True, [-1] * len(positions)
    for position in positions:
        phases.append(position % chunk)
    for end, row in enumerate(range(len(phases)) if ends is None else ends):
        phase, count = phases[row], counts[row]
        all_end = all_end and count > 0 and (phase + count) % chunk == 0
        none_began = none_began and (count == 0 or (phase > 0 and phase + count < chunk))
        end_rows[row] = end
    layers = len(state.weights)
    plan = _Plan(
        options, mask, state.position, layers, torch.tensor(phases), torch.tensor(counts, dtype=torch.int32), order,
        torch.tensor(end_rows, dtype=torch.int32), not (all_end or none_began), product_dtype(tokens.q.dtype),
    )  # fmt: skip
    momentum = () if tokens.eta is None else state.momentum
    anchor = state.anchor if any(phases) or not all(counts) else ()
    tensors = [*tokens, norm, *state.weights, *momentum, *anchor]
    y, *parts = _Memory.apply(plan, *tensors) if needs_grad(*tensors) else _forward(plan, tensors)[0]
    weights = tuple(parts[:layers])
    moved = time if order is None else plan.counts.to(torch.int64)
    state = state._replace(position=state.position + moved)
    if ends is not None:
        state = state.rows(ends)
    momentum = state.momentum if tokens.eta is None else tuple(parts[layers : 2 * layers])
    anchor = weights if all_end else state.anchor if none_began else tuple(parts[-layers:])
    return y, MemoryState(weights, momentum, anchor, state.position)


def _formula(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    plan = ctx.plan
    *given, gain = tensors[:_STATE]
    state, eta = tensors[_STATE:], given[4]
    weights, momentum, anchor = (tuple(state[i * plan.layers : (i + 1) * plan.layers]) for i in range(3))
    if eta is None:
        momentum, anchor = (), momentum
    before = MemoryState(weights, momentum, anchor or weights, plan.position)
    y, after = closed_form_memory(Tokens(*given), before, gain, plan.mask, plan.options)
    if plan.options.ends is not None:
        after = after.rows(plan.options.ends)
    return (y, *after.weights, *after.momentum, *(after.anchor if plan.new_anchor else ()))


class _Memory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.plan, ctx.checkpoints = plan, _checkpoints(plan, tensors)
        results, saved = _forward(plan, tensors, ctx.checkpoints)
        ctx.save_for_backward(*tensors, saved)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @differentiable(_formula, first=1)
    def backward(ctx: Any, grad_y: Tensor | None, *grad_end: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, (*tensors, saved) = ctx.plan, ctx.saved_tensors
        tokens, gain, state = _unpack(tensors)
        parts = 1 if tokens.eta is None else 2
        grad_y = torch.zeros_like(tokens.like_outputs()) if grad_y is None else dense(1, [grad_y])[0]
        ends = len(state[0]) if plan.options.ends is None else len(plan.options.ends)
        given = any(g is not None for g in grad_end[: parts * plan.layers])  # otherwise, the last write is skipped
        grad_end = tuple(
            (state[i].new_zeros(ends, *state[i].shape[1:]) if given and i < parts * plan.layers else None)
            if g is None
            else dense(2, [g])[0]
            for i, g in enumerate(grad_end)
        )
        # those of masked tokens are zero, and those of tokens that are in the windows of two chunks are sums
        new = empty_huge_pages if plan.order is None and plan.options.window == 1 else torch.zeros
        grads = tokens.map(lambda x: new(x.shape, dtype=x.dtype))
        grad_gain = None if gain is None else gain.new_empty(tokens.q.shape[0], *gain.shape)
        wanted = ctx.needs_input_grad[-len(state) :]
        grad_state = [torch.empty(x.shape, dtype=x.dtype) if need else None for x, need in zip(state, wanted)]
        _run(plan, ctx.checkpoints, tokens, gain, state, saved.contiguous(), None, (), (*grads, grad_y), grad_gain,
             grad_state, grad_end)  # fmt: skip
        return None, *grads, None if grad_gain is None else grad_gain.sum(0), *grad_state


def _forward(
    plan: _Plan, tensors: Sequence[Any], checkpoints: Checkpoints = NOTHING_SAVED
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """``y`` and the state's parts; what is saved for backward."""
    tokens, gain, state = _unpack(tensors)
    outputs = (*tokens.q.shape[:3], tokens.v.shape[3])
    y = (empty_huge_pages if plan.order is None else torch.zeros)(outputs, dtype=tokens.v.dtype)
    made = plan.layers * (1 + (tokens.eta is not None) + plan.new_anchor)
    end = []
    for i in range(made):
        like = state[i % plan.layers]
        rows = len(like) if plan.options.ends is None else len(plan.options.ends)
        end.append(torch.empty((rows, *like.shape[1:]), dtype=y.dtype))
    saved = None
    if checkpoints.interval:
        batch, _, heads, _ = tokens.q.shape
        saved = empty_huge_pages((batch * heads * _saved_numbers(plan, tensors, checkpoints),), y.dtype)
    _run(plan, checkpoints, tokens, gain, state, saved, y, end)
    return (y, *end), saved


def _unpack(tensors: Sequence[Any]) -> tuple[Tokens, Tensor | None, list[Tensor]]:
    """Tokens, gain and state, laid out as the kernels take them; hooks on saved tensors may change the layout."""
    *given, gain = tensors[:_STATE]
    tokens = Tokens(*given)
    q, k, v = dense(1, tokens[:3])
    alpha = tokens.alpha
    if alpha is not None and alpha.dim() == 4:
        (alpha,) = dense(1, [alpha])
    gain = None if gain is None else gain.contiguous()
    return tokens._replace(q=q, k=k, v=v, alpha=alpha), gain, dense(2, tensors[_STATE:])


def _checkpoints(plan: _Plan, tensors: Sequence[Any]) -> Checkpoints:
    q, eta, weights, keep = tensors[0], tensors[4], tensors[_STATE : _STATE + plan.layers], plan.options.keep
    batch, time, heads, _ = q.shape
    chunks = -(-time // plan.options.chunk) + 1
    if keep is not None and keep > 1:
        return Checkpoints(min(keep, chunks, LONGEST_INTERVAL))
    left = CHECKPOINT_BYTES - batch * time * heads * sum(w.shape[2] for w in weights) * q.element_size()
    interval, longest = CHECKPOINT_INTERVALS
    if keep is None:
        states = chunks * sum(w.numel() for w in weights) * (1 if eta is None else 2) * q.element_size()
        while states > left * interval and interval < longest:
            interval *= 2
    return Checkpoints(keep or interval, left >= 0)


def _saved_numbers(plan: _Plan, tensors: Sequence[Any], checkpoints: Checkpoints) -> int:
    """Numbers that the kernel keeps for one row and head, at most; a row of them is padded to a cache line."""
    q, eta, weights = tensors[0], tensors[4], tensors[_STATE : _STATE + plan.layers]
    line = 64 // q.element_size()
    padded = [(-(-w.shape[2] // line) * line, -(-w.shape[3] // line) * line) for w in weights]
    chunks = max(-(-(p + c) // plan.options.chunk) for p, c in zip(plan.phases.tolist(), plan.counts.tolist()))
    states = (
        (chunks - 1) // checkpoints.interval * sum(out * width for out, width in padded) * (1 if eta is None else 2)
    )
    return states + (q.shape[1] * sum(out for out, _ in padded) if checkpoints.activations else 0)


def _run(
    plan: _Plan,
    checkpoints: Checkpoints,
    tokens: Tokens,
    gain: Tensor | None,
    state: Sequence[Tensor],
    saved: Tensor | None,
    y: Tensor | None,
    end: Sequence[Tensor],
    grads: Sequence[Tensor | None] = (None,) * _STATE,
    grad_gain: Tensor | None = None,
    grad_state: Sequence[Tensor | None] = (),
    grad_end: Sequence[Tensor | None] = (),
) -> None:
    """The structure ``call`` of cpu.c, field by field."""
    options, objective, layers = plan.options, plan.options.objective, plan.layers
    batch, time, heads, width = tokens.q.shape
    momentum, backward, tasks = tokens.eta is not None, bool(grad_state), batch * heads
    matrices = [0] * (4 * 3 * LAYERS * 3)  # of weights, momentum and anchor
    for i, part in enumerate((state, end, grad_state, grad_end)):
        for j, x in enumerate(part):
            which, layer = divmod(j, layers)
            if x is not None:
                at = 3 * (LAYERS * (3 * i + (2 if which and not momentum else which)) + layer)
                matrices[at : at + 3] = x.data_ptr(), x.stride(0), x.stride(1)
    stages, past = 2 if options.gated else layers, options.window - 1
    channels = tokens.alpha is not None and tokens.alpha.dim() == 4
    widths: list[int] = [width]
    places: list[int] = []
    for w in state[:stages]:
        widths.append(w.shape[2])
    for x in (*tokens, y, *grads):
        if x is None:
            places += (0, 0, 0, 0)
        else:  # the kernel counts from the first token that is in a window
            missing = (past + time - x.shape[1]) * x.stride(1) * x.element_size()
            places += (x.data_ptr() - missing, *x.stride()[:3])
    _memory_run(
        plan.operands,
        batch, time, heads, stages, options.chunk, ACTIVATION_NUMBERS[options.activation],
        LOSS_NUMBERS[objective.kind, objective.smooth is not None, objective.form], momentum, gain is not None,
        READ_NUMBERS[options.read], options.gated, past, channels, backward,
        max(1, min(torch.get_num_threads(), tasks)),
        *checkpoints, 0 if saved is None else saved.numel() // max(tasks, 1),
        *widths, *[0] * (LAYERS - stages), *places,
        address(gain), address(grad_gain), plan.phases.data_ptr(), address(plan.order), plan.counts.data_ptr(),
        plan.end_rows.data_ptr(), address(saved), *matrices, options.clip or 0.0,
        objective.p, objective.delta, objective.smooth or 0.0,
    )  # fmt: skip


def dense(dims: int, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors with their last one or two dimensions dense: vectors or matrices."""
    dense = []
    for x in tensors:
        dense.append(x if x.stride(-1) == 1 and (dims == 1 or x.stride(-2) == x.shape[-1]) else x.contiguous())
    return dense


# -- read_memory -------------------------------------------------------------------------------------------------------


def cpu_read(
    q: Tensor, weights: Sequence[Tensor], activation: str, norm: Tensor | None, half: str | None = None
) -> Tensor:
    """``read_memory`` with weights in float32 or float64 on a CPU."""
    if q.dtype != weights[0].dtype:
        return cpu_read(q.to(weights[0].dtype), weights, activation, norm).to(q.dtype)
    if needs_grad(q, norm, *weights):
        return _Read.apply(activation, product_dtype(q.dtype), q, norm, *weights)
    y = empty_huge_pages((*q.shape[:3], weights[-1].shape[2]), q.dtype)
    _run_read(activation, product_dtype(q.dtype), q, norm, weights, y)
    return y


class _Read(torch.autograd.Function):
    """Keeps the queries and the weights, which exist anyway, and no hidden value."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, products: torch.dtype, q: Tensor, norm: Tensor | None, *weights: Tensor
    ) -> Tensor:
        y = empty_huge_pages((*q.shape[:3], weights[-1].shape[2]), q.dtype)
        ctx.activation, ctx.operands = activation, products
        ctx.save_for_backward(q, norm, *weights)
        _run_read(activation, products, q, norm, weights, y)
        return y

    @staticmethod
    @differentiable(read_formula, first=2)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, norm, *weights = ctx.saved_tensors
        grad_q = empty_huge_pages(q.shape, q.dtype)
        grad_norm = None if norm is None else norm.new_empty(q.shape[0], *norm.shape)
        grad_weights = [torch.empty(w.shape, dtype=w.dtype) for w in weights]
        _run_read(
            ctx.activation, ctx.operands, q, norm, weights, None, dense(1, [grad])[0], grad_q, grad_norm, grad_weights
        )
        return None, None, grad_q, None if grad_norm is None else grad_norm.sum(0), *grad_weights


def _run_read(
    activation: str,
    products: torch.dtype,
    q: Tensor,
    norm: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor | None,
    grad: Tensor | None = None,
    grad_q: Tensor | None = None,
    grad_norm: Tensor | None = None,
    grad_weights: Sequence[Tensor] = (),
) -> None:
    """The structure ``call`` of read_cpu.c, field by field."""
    q, norm, weights = dense(1, [q])[0], None if norm is None else norm.contiguous(), dense(2, weights)
    batch, time, heads, width = q.shape
    widths: list[int] = [width]
    places: list[int] = []
    matrices: list[int] = []
    for w in weights:
        widths.append(w.shape[2])
    for x in (q, y, grad_q, grad):
        places += (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])
    for part in (weights, grad_weights):
        for w in part:
            matrices += w.data_ptr(), w.stride(0), w.stride(1)
        matrices += [0] * (3 * (LAYERS - len(part)))
    _read_run(
        products, batch, time, heads, len(weights), ACTIVATION_NUMBERS[activation], grad is not None,
        max(1, min(torch.get_num_threads(), batch * heads)), *widths, *[0] * (LAYERS - len(weights)), *places,
        address(norm), address(grad_norm), *matrices,
    )  # fmt: skip
