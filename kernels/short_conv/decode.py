"""What a memory computes from one token before writing or reading: projections, convolution, unit length and gates.

For one token these are a dozen operators, each of which costs more to start than to run; the C kernel (decode_cpu.c)
does all of it. Nothing here records gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, threads_for
from ..dispatch import Backend, Operation, can_prepare
from ..linear import project
from ..norm_gate import l2_norm
from . import EPS, convolve


class Inputs(NamedTuple):
    """One token of each row, as a memory takes it."""

    q: Tensor
    """``[batch, 1, heads, dim]``, of unit length."""
    k: Tensor
    """``[batch, 1, heads, dim]``, of unit length."""
    v: Tensor
    """``[batch, 1, heads, dim]``."""
    gates: tuple[Tensor, ...]
    """Each ``[batch, 1, heads]``, in the order of the controls; the first, the step size, times ``max_step``."""
    history: Tensor | None
    """For the next token; ``None`` without a convolution."""


class Layers(NamedTuple):
    """The parameters that make a memory's inputs of a token; for the query alone, without controls."""

    weight: Tensor
    """``[3 * heads * dim, in]``: of q, then k, then v; for the query alone ``[heads * dim, in]``."""
    convolution: Tensor | None
    """``[3 * heads * dim, width]``, its last column on the token, or ``None``."""
    heads: int
    controls: Tensor | None = None
    """``[gates * heads, in]``: each gate is a sigmoid of these products."""
    bias: Tensor | None = None
    """``[gates * heads]``."""
    max_step: float = 1.0
    """Factor of the first gate."""
    hard: bool = False
    """Each gate is a hard sigmoid instead: ``(z + 3) / 6``, clamped to 0 and 1."""

    def queries(self) -> Layers:
        """Those of the query alone."""
        return Layers(self.weight[: len(self.weight) // 3], self.convolution, self.heads)


def memory_inputs(x: Tensor, history: Tensor | None, layers: Layers, *, backend: str = "auto") -> Inputs:
    """A memory's inputs from one token ``x`` ``[batch, 1, in]``, where ``use_decode_kernel(x, layers.weight)``.

    ``history``: ``[batch, width - 1, 3 * heads * dim]``, what was projected before; ``None`` without a convolution.
    """
    run = _operation.choose(backend, x, history, layers.convolution, layers.controls, layers.bias)
    y, gates, history = run(x, history, layers)
    q, k, v = y.unbind()
    return Inputs(q, k, v, gates, history)


def memory_query(x: Tensor, history: Tensor | None, layers: Layers, *, backend: str = "auto") -> Tensor:
    """The query alone, ``[batch, 1, heads, dim]``; ``history`` as of :func:`memory_inputs`."""
    run = _operation.choose(backend, x, history, layers.convolution)
    query: Tensor = run(x, history, layers)[0][0]
    return query


def prepare_inputs(
    layers: Layers, batch: int
) -> tuple[Inputs, Callable[[Tensor, Tensor | None], Tensor | None]] | None:
    """:func:`memory_inputs`, or without controls :func:`memory_query`, prepared for one token of each row, many times.

    Returns the tensors of the result, and a function of ``x`` ``[batch, 1, in]`` and the history, which fills them and
    returns the next history; ``None`` where the C kernel does not run. Without controls, every field is the query, and
    the history is returned as it is.
    """
    weight, convolution, _, controls, bias, *_ = layers
    if not (
        can_prepare(weight, convolution, controls, bias)
        and _operation.choose("auto", device="cpu", dtype=weight.dtype) is _native
    ):
        return None
    y, gate, sizes = _results(layers, batch)
    writes = controls is not None
    call = _KERNEL.prepare(
        weight.dtype, 9, 5, *sizes, *[0] * 5, weight, controls, bias, convolution, y, gate, layers.max_step, EPS
    )

    def run(x: Tensor, history: Tensor | None) -> Tensor | None:
        x = x.contiguous()
        if history is None:
            call(x.data_ptr(), 0, 0, 0, 0)
            return None
        history, row, token, new = _histories(history, writes)
        call(x.data_ptr(), history.data_ptr(), row, token, address(new))
        return new if writes else history

    return Inputs(y[0], y[len(y) // 2], y[-1], () if gate is None else gate.unbind(), None), run


_Outputs: TypeAlias = tuple[Tensor, tuple[Tensor, ...], Tensor | None]
"""``[parts, batch, 1, heads, dim]``, the gates, and the next history."""


def _native(x: Tensor, history: Tensor | None, layers: Layers) -> _Outputs:
    x, weight, max_step = x.contiguous(), layers.weight.contiguous(), layers.max_step
    controls, bias = (None if t is None else t.contiguous() for t in (layers.controls, layers.bias))
    convolution, row, token, new = None, 0, 0, None
    if history is None:
        layers = layers._replace(convolution=None)
    elif layers.convolution is not None:
        convolution = layers.convolution.contiguous()
        history, row, token, new = _histories(history, controls is not None)
    y, gate, sizes = _results(layers, x.shape[0])
    _KERNEL(
        x.dtype, *sizes, x.data_ptr(), address(history), row, token, address(new),
        weight.data_ptr(), address(controls), address(bias), address(convolution), y.data_ptr(), address(gate),
        max_step, EPS,
    )  # fmt: skip
    return y, () if gate is None else gate.unbind(), new


def _results(layers: Layers, batch: int) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """Empty tensors for the outputs and gates, and the first fields of ``struct call``."""
    weight, convolution, heads, controls, *_ = layers
    channels, width = weight.shape
    parts, gates = (1, 0) if controls is None else (3, controls.shape[0])
    dim = channels // (parts * heads)
    taps = 1 if convolution is None else convolution.shape[1]
    y = torch.empty((parts, batch, 1, heads, dim), dtype=weight.dtype)
    gate = torch.empty((gates // heads, batch, 1, heads), dtype=weight.dtype) if gates else None
    return y, gate, (threads_for(weight.nbytes), batch, width, heads, dim, taps, gates, parts, layers.hard)


def _histories(history: Tensor, writes: bool) -> tuple[Tensor, int, int, Tensor | None]:
    """The history with dense channels, its strides of rows and tokens, and an empty tensor for the next one."""
    history = history if history.stride(2) == 1 else history.contiguous()
    row, token, _ = history.stride()
    return history, row, token, torch.empty_like(history, memory_format=torch.contiguous_format) if writes else None


def _torch(x: Tensor, history: Tensor | None, layers: Layers, backend: str = "auto") -> _Outputs:
    weight, convolution, heads, controls, bias, max_step, hard = layers
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
    theta, *others = (F.hardsigmoid if hard else torch.sigmoid)(raw).split_with_sizes(
        [heads] * (raw.shape[-1] // heads), dim=-1
    )
    return torch.cat([qk, parts[2:]]), (theta * max_step, *others), history


def _outputs(x: Tensor, history: Tensor | None, layers: Layers) -> _Outputs:
    weight, convolution, heads, controls, *_ = layers
    parts, gates = (1, 0) if controls is None else (3, controls.shape[0] // heads)
    y = x.new_empty(parts, x.shape[0], 1, heads, weight.shape[0] // (parts * heads))
    return y, (y[0, ..., 0],) * gates, None if convolution is None or controls is None else history


_KERNEL = Kernel("memory_inputs", integers=20, doubles=2)

_operation = Operation(
    "memory_inputs",
    [
        Backend("native", _native, library.refuse, opaque=True),
        Backend("torch", _torch),
        Backend("reference", functools.partial(_torch, backend="reference")),
    ],
    _outputs,
    [Layers],
)
