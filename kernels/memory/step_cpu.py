"""One token on the C kernels: the step of the recurrence, and reading at fixed weights. No gradients.

The state is read where it lies, in whatever strides its batch and heads have, and written once, to new tensors.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..cpu_runtime.call import threads_for as threads_worth
from ..cpu_runtime.library import library, refuse
from ..custom_op import format_symint as told
from .activation import NUMBERS
from .state import MemoryState
from .tokens import Options, Tokens

WITHIN, STARTS, MASKED = range(3)
"""What a row's token is, as ``enum row`` numbers it: inside its chunk, the first of it, or no token at all."""

_Heads: TypeAlias = tuple[int, int, int]
"""Address, and numbers from row to row and from head to head: ``heads`` of step.c."""
_NONE = (0, 0, 0)


def refuse_token(*, dtype: torch.dtype, time: int = 1, grad: bool = False, **facts: Any) -> str | None:
    """Why the kernels cannot run, or ``None``; a half-precision model's memory computes in float32."""
    if time != 1:
        return f"takes one token, not {told(time)}"
    if grad:
        return "has no backward; gradients are wanted"
    return refuse(dtype=torch.promote_types(dtype, torch.float32), **facts)


def native_step(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for ``time = 1`` without gradients. Rows may be at different positions."""
    shapes = [(weight.shape[2], weight.shape[3]) for weight in state.weights]
    return Step(tokens, shapes, norm, options)(state, mask)


class Step:
    """:func:`native_step` for tokens that lie in ever the same tensors; the outputs ``y`` are one tensor too."""

    def __init__(
        self, tokens: Tokens, shapes: Sequence[tuple[int, int]], norm: Tensor | None, options: Options
    ) -> None:
        self.shapes, self.heads, self.momentum = shapes, tokens.q.shape[2], tokens.eta is not None
        self.chunk, activation, self.clip, read, *_, self.threshold = options
        self.y = _like(tokens.v)
        self._call = _Call("step", shapes, activation, read == "after", tokens[:3], tokens[3:], norm, self.y)

    def __call__(self, state: MemoryState, mask: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        weights, momentum, anchor, position = state
        heads, chunk = self.heads, self.chunk
        phases = [place % chunk for place in position.tolist()]
        real = [True] * len(phases) if mask is None else mask[:, 0].tolist()
        rows = bytes([MASKED if not r else WITHIN if phase else STARTS for r, phase in zip(real, phases)])

        held: list[Tensor] = []  # copies of what was not dense, alive until the kernel has run
        layers: list[int] = []
        new_weights, new_momentum = [], []
        for l, (out, width) in enumerate(self.shapes):
            weight, size = weights[l], out * width
            new = _like(weight)
            new_weights.append(new)
            layers += out, width, *_dense(weight, heads, size, held)
            if self.momentum:
                surprise = _like(weight)
                new_momentum.append(surprise)
                layers += _dense(momentum[l], heads, size, held)
                written = surprise.data_ptr(), heads * size, size
            else:
                layers += _NONE
                written = _NONE
            layers += *_dense(anchor[l], heads, size, held), new.data_ptr(), heads * size, size, *written
        self._call(layers, rows, self.clip or 0.0, self.threshold or 0.0)

        starts = [r and phase == 0 for r, phase in zip(real, phases)]
        ends = [r and phase + 1 == chunk for r, phase in zip(real, phases)]
        updated = tuple(new_weights)
        return self.y, MemoryState(
            updated,
            tuple(new_momentum) if self.momentum else momentum,
            _pick(ends, updated, _pick(starts, weights, anchor)),
            position + (1 if mask is None else mask[:, 0]),
        )


def native_read(q: Tensor, weights: Sequence[Tensor], activation: str, norm: Tensor | None) -> Tensor:
    """``read_memory`` for one query of each row, without gradients."""
    return Read(q, [(weight.shape[2], weight.shape[3]) for weight in weights], activation, norm)(weights)


class Read:
    """:func:`native_read` for queries that lie in ever the same tensor; the answers ``y`` are one tensor too."""

    def __init__(self, q: Tensor, shapes: Sequence[tuple[int, int]], activation: str, norm: Tensor | None) -> None:
        batch, _, heads, _ = q.shape
        self.shapes, self.heads = shapes, heads
        self.y = torch.empty((batch, 1, heads, shapes[-1][0]), dtype=q.dtype)
        self._call = _Call("read_token", shapes, activation, False, [q, None, None], [None] * 3, norm, self.y)

    def __call__(self, weights: Sequence[Tensor]) -> Tensor:
        held: list[Tensor] = []
        layers: list[int] = []
        for (out, width), weight in zip(self.shapes, weights):
            layers += out, width, *_dense(weight, self.heads, out * width, held), *_NONE, *_NONE, *_NONE, *_NONE
        self._call(layers, b"")
        return self.y


class _Call:
    """A structure ``call`` of step.c, whole numbers of 64 bits and addresses among them, filled but for its layers."""

    def __init__(
        self,
        name: str,
        shapes: Sequence[tuple[int, int]],
        activation: str,
        after: bool,
        tokens: Sequence[Tensor | None],
        gates: Sequence[Tensor | None],
        norm: Tensor | None,
        y: Tensor,
    ) -> None:
        batch, _, heads, width = y.shape
        self.held = [y]
        size = batch * heads * y.element_size() * sum([out * before for out, before in shapes])
        threads = min(threads_worth(size), batch * heads)
        fields = [batch, heads, len(shapes), NUMBERS[activation], after, threads]
        for x in tokens:
            fields += _NONE if x is None else _dense(x, heads, x.shape[3], self.held)
        for x in gates:
            fields += _gates(x)
        fields += _NONE if norm is None else (_dense(norm, heads, width, self.held)[0], 0, width)
        fields += y.data_ptr(), heads * width, width
        self.held += [x.detach() for x in (*tokens, *gates, norm) if x is not None]
        self._layers = _packer(17 * len(shapes))
        self._at = 8 * len(fields)
        self._structure = ctypes.create_string_buffer(self._at + 8 * 17 * len(shapes))
        _packer(len(fields))(self._structure, 0, *fields)
        self._function = _function(name, y.dtype)

    def __call__(self, layers: list[int], rows: bytes, clip: float = 0.0, threshold: float = 0.0) -> None:
        self._layers(self._structure, self._at, *layers)
        if self._function(self._structure, rows, clip, threshold):
            raise MemoryError("memory: no room for a token's scratch")


@functools.cache
def _packer(numbers: int) -> Callable[..., None]:
    return struct.Struct(f"{numbers}q").pack_into


def _like(x: Tensor) -> Tensor:
    """Dense and uninitialised. Asking by shape takes twice as long as asking by example."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[[Any, bytes, float, float], int]:
    kinds = ctypes.c_char_p, ctypes.c_char_p, ctypes.c_double, ctypes.c_double
    return ctypes.CFUNCTYPE(ctypes.c_int, *kinds)((name, library(dtype)))


def _dense(x: Tensor, heads: int, size: int, held: list[Tensor]) -> _Heads:
    """``heads`` of step.c for ``[batch, (1,) heads, ...]``, copied unless each head's ``size`` numbers are dense."""
    if x.is_contiguous():
        return x.data_ptr(), heads * size, size
    if x.dim() == 4:
        row, first, second, last = x.stride()
        if x.shape[1] == heads and second == x.shape[3] and last == 1:  # matrices
            return x.data_ptr(), row, first
        if x.shape[2] == heads and x.shape[3] == size and last == 1:  # vectors
            return x.data_ptr(), row, second
    x = x.contiguous()
    held.append(x)
    return x.data_ptr(), heads * size, size


def _gates(x: Tensor | None) -> _Heads:
    """The same for ``[batch, 1, heads]``, or none."""
    if x is None:
        return _NONE
    row, _, head = x.stride()
    return x.data_ptr(), row, head


def _pick(rows: list[bool], new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``new`` in the given rows: without a copy where all of them agree."""
    if not any(rows):
        return old
    if all(rows):
        return new
    chosen = torch.tensor(rows).view(-1, 1, 1, 1)
    return tuple([torch.where(chosen, a, b) for a, b in zip(new, old)])
