"""A memory of one matrix on the fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...autograd import differentiable
from ...dispatch import full_precision
from ...triton_runtime import launch
from ..chunkwise_torch import chunks_formula, chunks_of, groups_of, plan_memory, room_of, scatter
from ..decay_torch import ChunkDecay
from ..state import Options, Tokens
from .decay import triton_decay
from .linear_kernels import linear_kernel, linear_read_backward_kernel, linear_write_backward_kernel
from .read import dense, steps
from .schedule import loss_constants, schedule


class LinearMemory(torch.autograd.Function):
    """``time`` tokens, a multiple of ``options.chunk``, that start at a chunk boundary -> ``y``, weights, momentum.

    ``products``: what ``schedule.operands`` said. ``chunk``: that of the memory, which tiles go by.
    """

    @staticmethod
    def forward(
        ctx: Any, products: dict[str, Any], chunk: int, options: Options, layers: int, valid: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        call = _Call(products, chunk, options, valid, tensors)
        q, b, state, learns = call.tokens.q, options.chunk, call.state, any(ctx.needs_input_grad)
        batch, time, heads, _ = q.shape
        y = q.new_empty(batch, time, heads, state.shape[-2])
        state_bytes, y_bytes = (x.numel() * state.element_size() for x in (state, y[:, :b]))
        room = room_of(q, call.chunks * state_bytes if learns else 0)
        keep = options.keep if learns else 1
        plan = plan_memory(call.chunks, state_bytes, y_bytes, keep, room, on_cpu=q.is_cpu)
        groups, keeps = groups_of(call.chunks, plan.group, b), learns and 1 in (plan.interval, plan.group)
        states = state.new_empty((call.chunks if keeps else len(groups)) + 1, *state.shape)
        states[0] = state
        for group, (first, times) in enumerate(groups):
            decay = call.decay(*call.gates(times))
            place, count = (first, len(decay.mix)) if keeps else (group, 1)
            call.write(times, decay, states[place : place + count + 1], y)
        if learns:
            ctx.save_for_backward(*tensors, states[:-1])
            ctx.products, ctx.chunk, ctx.options, ctx.layers = products, chunk, options, layers
            ctx.valid, ctx.keeps, ctx.size = valid, keeps, plan.group
        # copies, since kept states would live as long as the last one
        return y, *(
            x.clone(memory_format=torch.contiguous_format).unflatten(0, (batch, heads)) for x in states[-1].unbind(1)
        )

    @staticmethod
    @differentiable(chunks_formula, first=5)
    def backward(ctx: Any, grad_y: Tensor, *grad_state: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grad_y.device.type):
            return _backward(ctx, grad_y, *grad_state)


def _backward(ctx: Any, grad_y: Tensor, *grad_ends: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    options, b = ctx.options, ctx.options.chunk
    call = _Call(ctx.products, ctx.chunk, options, ctx.valid, tensors)
    rows, gain, grad_y = call.rows, call.gain, dense(grad_y)
    out = call.state.shape[-2]
    grads = call.tokens.map(lambda x: x.new_empty(x.shape))
    grad_state = torch.stack([x.flatten(0, 1) for x in grad_ends], 1)
    grad_anchor = None if call.anchor is None else torch.empty_like(call.anchor)
    grad_gain = None if gain is None else torch.zeros_like(gain)
    for group, (first, times) in reversed(list(enumerate(groups_of(call.chunks, ctx.size, b)))):
        q, k, v, g = (x[:, times] for x in (*call.tokens[:3], grad_y))
        *found, valid = call.gates(times)
        theta, eta, alpha = (None if x is None else x.detach().requires_grad_() for x in found)
        with torch.enable_grad():
            graph = call.decay(theta, eta, alpha, valid)
        decay = ChunkDecay(*(x.detach() for x in graph))
        chunks = len(decay.mix)
        if ctx.keeps:
            here = states[first : first + chunks]
        else:
            here = states.new_empty(chunks + 1, *call.state.shape)
            here[0] = states[group]
            call.write(times, decay, here, None)
        anchor = call.anchor if first == 0 else None
        of_decay = ChunkDecay(*map(torch.empty_like, decay))
        of_errors, of_keys = (states.new_empty(chunks, rows, b, width) for width in call.state.shape[-2:])
        of_states = states.new_empty(chunks, *call.state.shape)
        of_gain = None if gain is None else states.new_empty(chunks + 1, rows, out)
        call.launch(
            linear_read_backward_kernel, chunks * rows, (g, q, k, v), gain, decay.read, decay.carry, anchor, here,
            grads.q[:, times], of_keys, of_errors, of_states, of_decay.read, of_decay.carry, of_gain, rows,
            ANCHORED=anchor is not None,
        )  # fmt: skip
        call.launch(
            linear_write_backward_kernel, rows, (k, v), gain, decay.write, decay.mix, anchor, here,
            of_errors, of_keys, of_states, grad_state, grads.k[:, times], grads.v[:, times],
            None if of_gain is None else of_gain[chunks], of_decay.write, of_decay.mix, grad_anchor, chunks,
            ANCHORED=anchor is not None,
        )  # fmt: skip
        wanted = [x for x in (theta, eta, alpha) if x is not None]
        of_gates = iter(torch.autograd.grad(list(graph), wanted, list(of_decay)))
        for gate in grads[3:6]:
            if gate is not None:
                scatter(gate, next(of_gates), times, b)
        if grad_gain is not None and of_gain is not None:
            grad_gain += of_gain.view(-1, *grad_gain.shape).sum(0)
    of_state = [x.reshape(end.shape) for x, end in zip(grad_state.unbind(1), grad_ends)]
    return None, None, None, None, None, *grads, grad_gain, *of_state, *([] if grad_anchor is None else [grad_anchor])


class _Call:
    """The tensors of a call as the kernels take them, and the launches."""

    def __init__(
        self, products: dict[str, Any], chunk: int, options: Options, valid: Tensor | None, tensors: Any
    ) -> None:
        tokens, (gain, *state) = Tokens(*tensors[: len(Tokens._fields)]), tensors[len(Tokens._fields) :]
        q, k, v = map(dense, tokens[:3])
        self.tokens, self.valid, self.options, self._chunk = tokens._replace(q=q, k=k, v=v), valid, options, chunk
        self.gain = None if gain is None else gain.contiguous()
        parts = 1 if tokens.eta is None else 2
        self.state = torch.stack([x.flatten(0, 1) for x in state[:parts]], 1)
        """``[rows, parts, out, in]``."""
        self.anchor = state[parts].contiguous() if len(state) > parts else None
        self.rows, self.chunks = len(self.state), q.shape[1] // options.chunk
        d_out, width = self.state.shape[-2:]
        self._known = dict(
            width=width, d_out=d_out, PARTS=parts, NORM=gain is not None, CLIP=options.clip,
            WIDE=tl.float64 if self.state.dtype == torch.float64 else tl.float32, **products,
            **loss_constants(options.objective),
            **schedule(linear_kernel.__name__, chunk, width, width, d_out, products, layers=1, parts=parts),
        )  # fmt: skip

    def gates(self, times: slice) -> list[Any]:
        """Theta, eta, alpha and the slots that hold a token, of some chunks."""
        return chunks_of((*self.tokens[3:6], self.valid), times, self.options.chunk, self.tokens.q.shape[1])

    def decay(self, theta: Any, eta: Any, alpha: Any, valid: Any) -> ChunkDecay:
        return triton_decay(theta, eta, alpha, valid, self.options.read == "after", self._chunk)

    def write(self, times: slice, decay: ChunkDecay, states: Tensor, y: Tensor | None) -> None:
        """Set ``states`` after each chunk where there is room, else after the last; read where there is ``y``."""
        anchor, chunks = self.anchor if times.start == 0 else None, len(decay.mix)
        self.launch(
            linear_kernel, self.rows, [x[:, times] for x in self.tokens[:3]], self.gain, *decay, anchor, states,
            states if y is None else y[:, times], chunks,
            ANCHORED=anchor is not None, KEEP=len(states) > chunks, READS=y is not None,
        )  # fmt: skip

    def launch(self, kernel: Any, programs: int, strided: Sequence[Tensor], *arguments: Any, **flags: bool) -> None:
        """``strided``: ``[batch, time, heads, ...]`` of a group's tokens, which come first; their steps come last."""
        _, time, heads, _ = self.tokens.q.shape
        known = {**self._known, **flags}
        launch(
            kernel, (programs,), *strided, *arguments, 1, time, self.options.chunk, heads,
            *(step for x in strided for step in steps(x)),
            **{name: x for name, x in known.items() if name in (*kernel.arg_names, "num_warps", "num_stages")},
        )  # fmt: skip
