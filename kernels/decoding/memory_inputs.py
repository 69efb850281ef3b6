"""What a memory does with one token before it learns it, or answers it: projections, convolution, lengths and gates.

For one token these are a dozen operators, each of which costs more to start than to run; the C kernel does them in one.
Without gradients, and without the many tokens for which the operators of their own are as fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..convolution import convolve
from ..dispatch import Backend, Operation
from ..native import library
from ..native.kernel import Kernel, address, prepares
from ..normalisation import l2_norm
from ..projection import project, threads_for

EPS = 1e-6


class Inputs(NamedTuple):
    """One token of each row, as a memory learns it."""

    q: Tensor
    """``[batch, 1, heads, dim]``, of unit length."""
    k: Tensor
    """The same."""
    v: Tensor
    """``[batch, 1, heads, dim]``."""
    gates: tuple[Tensor, ...]
    """Each ``[batch, 1, heads]``, in the order of the controls; the first, the step size, times ``largest``."""
    history: Tensor | None
    """For the next token; ``None`` without a convolution."""


def memory_inputs(
    x: Tensor,
    weight: Tensor,
    convolution: Tensor | None,
    history: Tensor | None,
    heads: int,
    controls: Tensor,
    bias: Tensor,
    largest: float = 1.0,
    *,
    backend: str = "auto",
) -> Inputs:
    """From one token ``x`` ``[batch, 1, in]`` to what a memory learns: what ``gated_projection.few`` accepts.

    Args:
        weight: ``[3 * heads * dim, in]``: what becomes q, then k, then v.
        convolution: ``[3 * heads * dim, width]``, its last column on the token, or ``None``.
        history: ``[batch, width - 1, 3 * heads * dim]``: what was projected before.
        controls: ``[gates * heads, in]`` and bias ``[gates * heads]``: each gate is a sigmoid.
        largest: what the first gate is multiplied with.
    """
    run = _operation.choose(backend, device=x.device.type, dtype=x.dtype)
    y, gates, history = run(x, weight, convolution, history, heads, controls, bias, largest)
    q, k, v = y.unbind()
    return Inputs(q, k, v, gates, history)


def memory_query(
    x: Tensor,
    weight: Tensor,
    convolution: Tensor | None,
    history: Tensor | None,
    heads: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """The query alone, ``[batch, 1, heads, dim]``; ``weight`` ``[heads * dim, in]``, the first of those above."""
    run = _operation.choose(backend, device=x.device.type, dtype=x.dtype)
    query: Tensor = run(x, weight, convolution, history, heads, None, None, 1.0)[0][0]
    return query


def prepare_inputs(
    weight: Tensor,
    convolution: Tensor | None,
    heads: int,
    batch: int,
    controls: Tensor | None = None,
    bias: Tensor | None = None,
    largest: float = 1.0,
) -> tuple[Inputs, Callable[[Tensor, Tensor | None], Tensor | None]] | None:
    """:func:`memory_inputs`, or without controls :func:`memory_query`, for many times one token of each row.

    Returns the tensors of the result, and a function of a dense ``x`` ``[batch, 1, in]`` and the history before it,
    which fills them and returns the next history; ``None`` where that gains nothing. Without controls, the query
    alone is there, and the history stays.
    """
    if not (
        prepares(weight, convolution, controls, bias)
        and _operation.choose("auto", device="cpu", dtype=weight.dtype) is _native
    ):
        return None
    channels, width = weight.shape
    parts, gates = (1, 0) if controls is None else (3, controls.shape[0])
    dim = channels // (parts * heads)
    y = torch.empty((parts, batch, 1, heads, dim), dtype=weight.dtype)
    gate = torch.empty((gates // heads, batch, 1, heads), dtype=weight.dtype)
    taps = 1 if convolution is None else convolution.shape[1]
    call = _KERNEL.prepared(
        weight.dtype, 8, 5, threads_for(weight), batch, width, heads, dim, taps, gates, parts, *[0] * 5,
        weight, controls, bias, convolution, y, gate if gates else None, largest, EPS,
    )  # fmt: skip

    def run(x: Tensor, history: Tensor | None) -> Tensor | None:
        x = x.contiguous()
        if history is None:
            call(x.data_ptr(), 0, 0, 0, 0)
            return None
        history = history if history.stride(2) == 1 else history.contiguous()
        row, token, _ = history.stride()
        new = torch.empty_like(history, memory_format=torch.contiguous_format) if gates else history
        call(x.data_ptr(), history.data_ptr(), row, token, new.data_ptr() if gates else 0)
        return new

    return Inputs(y[0], y[parts // 2], y[-1], gate.unbind(), None), run


_Outputs: TypeAlias = tuple[Tensor, tuple[Tensor, ...], Tensor | None]
"""``[parts, batch, 1, heads, dim]``, the gates, and the next history."""


def _native(
    x: Tensor,
    weight: Tensor,
    convolution: Tensor | None,
    history: Tensor | None,
    heads: int,
    controls: Tensor | None,
    bias: Tensor | None,
    largest: float,
) -> _Outputs:
    x, weight = x.contiguous(), weight.contiguous()
    controls, bias = (None if t is None else t.contiguous() for t in (controls, bias))
    batch, (channels, width) = x.shape[0], weight.shape
    parts = 1 if controls is None else 3
    dim = channels // (parts * heads)
    taps, row, token, new_history = 1, 0, 0, None
    if convolution is not None and history is not None:
        convolution = convolution.contiguous()
        taps = convolution.shape[1]
        history = history if history.stride(2) == 1 else history.contiguous()
        row, token, _ = history.stride()
        if controls is not None:
            new_history = torch.empty_like(history, memory_format=torch.contiguous_format)
    y = torch.empty((parts, batch, 1, heads, dim), dtype=x.dtype)
    gate, gates = None, 0
    if controls is not None:
        gates = controls.shape[0]
        gate = torch.empty((gates // heads, batch, 1, heads), dtype=x.dtype)
    _KERNEL(
        x.dtype, threads_for(weight), batch, width, heads, dim, taps, gates, parts,
        x.data_ptr(), address(history), row, token, address(new_history),
        weight.data_ptr(), address(controls), address(bias), address(convolution), y.data_ptr(), address(gate),
        largest, EPS,
    )  # fmt: skip
    return y, () if gate is None else gate.unbind(), new_history


def _composed(
    x: Tensor,
    weight: Tensor,
    convolution: Tensor | None,
    history: Tensor | None,
    heads: int,
    controls: Tensor | None,
    bias: Tensor | None,
    largest: float,
    backend: str = "auto",
) -> _Outputs:
    projected, channels = project(x, weight, backend=backend), weight.shape[0]
    if convolution is not None and history is not None:
        past = torch.cat((history[..., :channels], projected), dim=1)
        projected, history = convolve(past, convolution[:channels], backend=backend), past[:, 1:]
    count = 1 if controls is None else 3
    parts = F.silu(projected).unflatten(-1, (count, heads, -1)).movedim(2, 0)
    qk = l2_norm(parts[:2], EPS, backend=backend)
    if controls is None:
        return qk, (), None
    raw = project(x, controls, bias, backend=backend)
    theta, *others = torch.sigmoid(raw).split_with_sizes([heads] * (raw.shape[-1] // heads), dim=-1)
    return torch.cat([qk, parts[2:]]), (theta * largest, *others), history


_reference = functools.partial(_composed, backend="reference")


_KERNEL = Kernel("memory_inputs", 19, 2)

_operation = Operation(
    "memory_inputs",
    [Backend("native", _native, library.refuse), Backend("torch", _composed), Backend("reference", _reference)],
)
