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

from ..native.library import library, refuse
from .state import MemoryState

ACTIVATIONS = {"identity": 0, "relu": 1, "silu": 2, "gelu": 3}
"""As ``enum activation`` numbers them."""

WITHIN, STARTS, MASKED = range(3)
"""What a row's token is, as ``enum row`` numbers it: inside its chunk, the first of it, or no token at all."""

WORTH_A_THREAD = 2**18
"""Bytes of weights that take longer to read than another thread takes to begin."""

_Heads: TypeAlias = tuple[int, int, int]
"""Address, and numbers from row to row and from head to head: ``heads`` of step.c."""
_NONE = (0, 0, 0)


def refuse_token(*, dtype: torch.dtype, time: int = 1, grad: bool = False, **facts: Any) -> str | None:
    """Why the kernels cannot run, or ``None``; a half-precision model's memory computes in float32."""
    if time != 1:
        return f"takes one token, not {time}"
    if grad:
        return "has no backward; gradients are wanted"
    return refuse(dtype=torch.promote_types(dtype, torch.float32), **facts)


def native_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: MemoryState,
    *,
    chunk: int,
    activation: str,
    norm: Tensor | None,
    mask: Tensor | None,
    clip: float | None,
    read: str,
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for ``time = 1`` without gradients. Rows may be at different positions."""
    batch, _, heads, _ = q.shape
    weights, momentum, anchor, position = state
    phases = [place % chunk for place in position.tolist()]
    real = [True] * batch if mask is None else mask[:, 0].tolist()
    rows = bytes([MASKED if not r else WITHIN if phase else STARTS for r, phase in zip(real, phases)])

    held: list[Tensor] = []  # copies of what was not dense, alive until the kernel has run
    layers: list[int] = []
    new_weights, new_momentum = [], []
    for l, weight in enumerate(weights):
        out, width = weight.shape[2:]
        size = out * width
        new = _like(weight)
        new_weights.append(new)
        layers += out, width, *_dense(weight, heads, size, held)
        if eta is None:
            layers += _NONE
        else:
            surprise = _like(weight)
            new_momentum.append(surprise)
            layers += _dense(momentum[l], heads, size, held)
        layers += *_dense(anchor[l], heads, size, held), new.data_ptr(), heads * size, size
        layers += _NONE if eta is None else (surprise.data_ptr(), heads * size, size)
    y = _like(v)
    tokens = [_dense(x, heads, x.shape[3], held) for x in (q, k, v)]
    gates = [_gates(x) for x in (theta, eta, alpha)]
    call = _pack(weights, heads, activation, read == "after", [*tokens, *gates], norm, y, layers, held)
    if _function("step", y.dtype)(call, rows, clip or 0.0):
        raise MemoryError("memory: no room for a step's scratch")

    starts = [r and phase == 0 for r, phase in zip(real, phases)]
    ends = [r and phase + 1 == chunk for r, phase in zip(real, phases)]
    updated = tuple(new_weights)
    return y, MemoryState(
        updated,
        momentum if eta is None else tuple(new_momentum),
        _pick(ends, updated, _pick(starts, weights, anchor)),
        position + (1 if mask is None else mask[:, 0]),
    )


def native_read(q: Tensor, weights: Sequence[Tensor], activation: str, norm: Tensor | None) -> Tensor:
    """``read_memory`` for one query of each row, without gradients."""
    batch, _, heads, width = q.shape
    held: list[Tensor] = []
    layers: list[int] = []
    for weight in weights:
        out, before = weight.shape[2:]
        layers += out, before, *_dense(weight, heads, out * before, held), *_NONE, *_NONE, *_NONE, *_NONE
    y = torch.empty((batch, 1, heads, out), dtype=q.dtype)
    tokens = [_dense(q, heads, width, held), _NONE, _NONE, _NONE, _NONE, _NONE]
    call = _pack(weights, heads, activation, False, tokens, norm, y, layers, held)
    if _function("read_token", y.dtype)(call, b"", 0.0):
        raise MemoryError("memory: no room for a query's scratch")
    return y


def _like(x: Tensor) -> Tensor:
    """Dense and uninitialised. Asking by shape takes twice as long as asking by example."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[[bytes, bytes, float], int]:
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_double)((name, library(dtype)))


def _pack(
    weights: Sequence[Tensor],
    heads: int,
    activation: str,
    after: bool,
    tokens: list[_Heads],
    norm: Tensor | None,
    y: Tensor,
    layers: list[int],
    held: list[Tensor],
) -> bytes:
    """``call`` of step.c: whole numbers of 64 bits, addresses among them."""
    batch, width = y.shape[0], y.shape[3]
    size = sum([w.nbytes for w in weights])
    threads = min(torch.get_num_threads(), batch * heads, 1 + size // WORTH_A_THREAD)
    fields = [batch, heads, len(weights), ACTIVATIONS[activation], after, threads]
    for x in tokens:
        fields += x
    fields += _NONE if norm is None else (_dense(norm, heads, width, held)[0], 0, width)
    fields += y.data_ptr(), heads * width, width
    fields += layers
    return struct.pack(f"{len(fields)}q", *fields)


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
