"""One token per row on the C kernels: the step of the recurrence, and reading at fixed weights. No gradients.

The state is read in place, with any strides of its batch and heads, and the new state is written once, to new tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, threads_for
from .network_torch import ACTIVATION_NUMBERS, LOSS_NUMBERS, READ_NUMBERS
from .state import MemoryState, Options, Tokens, where_rows

_NONE = (0, 0, 0)


def refuse_cpu_step(*, dtype: torch.dtype, **facts: Any) -> str | None:
    """Why the kernels cannot run, or ``None``; a half-precision model's memory computes in float32."""
    return library.refuse(dtype=torch.promote_types(dtype, torch.float32), **facts)


def cpu_step(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for ``time = 1`` without gradients. Rows may be at different positions."""
    return StepPlan(tokens, [(weight.shape[2], weight.shape[3]) for weight in state.weights], norm, options, once=True)(
        state, mask
    )


def cpu_step_read(q: Tensor, weights: Sequence[Tensor], activation: str, norm: Tensor | None) -> Tensor:
    """``read_memory`` for one query per row, without gradients."""
    return ReadPlan(q, [(weight.shape[2], weight.shape[3]) for weight in weights], activation, norm, once=True)(weights)


class StepPlan:
    """A decode plan: :func:`cpu_step` for tokens that are in the same tensors each time. ``y`` is reused, too."""

    def __init__(
        self,
        tokens: Tokens,
        shapes: Sequence[tuple[int, int]],
        norm: Tensor | None,
        options: Options,
        once: bool = False,
    ) -> None:
        self.shapes, self.heads, self.momentum = shapes, tokens.q.shape[2], tokens.eta is not None
        self.chunk, self.y = options.chunk, _empty_like(tokens.v)
        self._run = _prepared("memory_step", shapes, options, tokens, norm, self.y, once)

    def __call__(self, state: MemoryState, mask: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        weights, momentum, anchor, position = state
        heads, chunk = self.heads, self.chunk
        used = [position.contiguous()]  # tensors that must stay alive until the kernel has run
        layers: list[int] = []
        new_weights, new_momentum = [], []
        for l, (out, width) in enumerate(self.shapes):
            size, new = out * width, _empty_like(weights[l])
            new_weights.append(new)
            layers += out, width, *_place(weights[l], heads, size, used)
            written = _NONE
            if self.momentum:
                moved = _empty_like(weights[l])
                new_momentum.append(moved)
                layers += _place(momentum[l], heads, size, used)
                written = moved.data_ptr(), heads * size, size
            else:
                layers += _NONE
            layers += *_place(anchor[l], heads, size, used), new.data_ptr(), heads * size, size, *written
        self._run(used[0].data_ptr(), address(mask), 0 if mask is None else mask.stride(0), *layers)

        phases = [place % chunk for place in position.tolist()]
        valid = [True] * len(phases) if mask is None else mask[:, 0].tolist()
        starts = [v and phase == 0 for v, phase in zip(valid, phases)]
        ends = [v and phase + 1 == chunk for v, phase in zip(valid, phases)]
        updated = tuple(new_weights)
        return self.y, MemoryState(
            updated,
            tuple(new_momentum) if self.momentum else momentum,
            _pick(ends, updated, _pick(starts, weights, anchor)),
            position + (1 if mask is None else mask[:, 0]),
        )


class ReadPlan:
    """:func:`cpu_step_read` for queries that are in the same tensor each time. ``y`` is reused, too."""

    def __init__(
        self,
        q: Tensor,
        shapes: Sequence[tuple[int, int]],
        activation: str,
        norm: Tensor | None,
        once: bool = False,
    ) -> None:
        batch, _, self.heads, _ = q.shape
        self.shapes, self.y = shapes, torch.empty((batch, 1, self.heads, shapes[-1][0]), dtype=q.dtype)
        options = Options(1, activation, None, "after")
        self._run = _prepared("memory_step_read", shapes, options, [q, *[None] * 5], norm, self.y, once)

    def __call__(self, weights: Sequence[Tensor]) -> Tensor:
        used: list[Tensor] = []
        layers: list[int] = []
        for (out, width), weight in zip(self.shapes, weights):
            layers += out, width, *_place(weight, self.heads, out * width, used), *[0] * 12
        self._run(0, 0, 0, *layers)
        return self.y


def _prepared(
    name: str,
    shapes: Sequence[tuple[int, int]],
    options: Options,
    tokens: Sequence[Tensor | None],
    norm: Tensor | None,
    y: Tensor,
    once: bool,
) -> Callable[..., None]:
    """The kernel as a function of the fields of ``call`` in step_cpu.c from ``position`` on; the others are filled in.

    A function that is called more than ``once`` fills them in before.
    """
    batch, _, heads, width = y.shape
    threads = min(
        threads_for(batch * heads * y.element_size() * sum([out * before for out, before in shapes])), batch * heads
    )
    copies: list[Tensor] = []
    objective = options.objective
    fields: list[Any] = [batch, heads, len(shapes), options.chunk, ACTIVATION_NUMBERS[options.activation],
                         LOSS_NUMBERS[objective.kind, objective.smooth is not None, objective.form],
                         READ_NUMBERS[options.read], threads]  # fmt: skip
    for x in tokens[:3]:
        fields += _NONE if x is None else _place(x, heads, x.shape[3], copies)
    for x in tokens[3:6]:
        fields += _NONE if x is None else (x.data_ptr(), x.stride(0), x.stride(2))
    norm = None if norm is None else norm.contiguous()
    fields += address(norm), 0, width
    fields += y.data_ptr(), heads * width, width
    kernel, bounds = (
        _kernel(name, len(shapes)),
        (options.clip or 0.0, options.threshold or 0.0, objective.p, objective.delta, objective.smooth or 0.0),
    )
    alive = [*copies, *tokens, norm, y]

    def run(*changing: int, alive: Any = alive) -> None:
        kernel(y.dtype, *fields, *changing, *bounds)

    if once:
        return run
    changing = 3 + 17 * len(shapes)
    prepared = kernel.prepare(y.dtype, len(fields), changing, *fields, *[0] * changing, *bounds)
    prepared.alive = alive  # type: ignore[attr-defined]
    return prepared


@functools.cache
def _kernel(name: str, layers: int) -> Kernel:
    return Kernel(name, 8 + 8 * 3 + 3 + 17 * layers, 5)


def _empty_like(x: Tensor) -> Tensor:
    """Dense and uninitialized. Allocating by shape takes twice as long as by example."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)


def _place(x: Tensor, heads: int, size: int, used: list[Tensor]) -> tuple[int, int, int]:
    """``heads`` of step_cpu.c for ``[batch, (1,) heads, ...]``; copies unless each head's numbers are dense."""
    if x.is_contiguous():
        return x.data_ptr(), heads * size, size
    if x.dim() == 4:
        row, first, second, last = x.stride()
        if x.shape[1] == heads and second == x.shape[3] and last == 1:  # matrices
            return x.data_ptr(), row, first
        if x.shape[2] == heads and x.shape[3] == size and last == 1:  # vectors
            return x.data_ptr(), row, second
    x = x.contiguous()
    used.append(x)
    return x.data_ptr(), heads * size, size


def _pick(rows: list[bool], new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``new`` in the given rows, without a copy where all agree."""
    if not any(rows):
        return old
    if all(rows):
        return new
    return where_rows(torch.tensor(rows), new, old)
