"""The short causal convolution, and queries, keys and values of a memory, which are made with it (paper 4.4).

``causal_convolution`` runs in Triton (triton.py) on GPUs, elsewhere as a sum of shifted products. ``query_key_value``
and ``query`` are one kernel, in C (cpu.c) on CPUs and in Triton on GPUs: convolution, SiLU and unit length in one pass
over memory each way. What a memory computes from one token is in decode.py.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import triton_runtime
from ..autograd import differentiable
from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, empty_huge_pages
from ..dispatch import Backend, Operation, expect_tensors, needs_grad, transforming
from ..norm_gate import l2_norm
from ..padding import last

EPS = 1e-6
"""In the unit length of queries and keys."""
LONGEST = 64
"""Taps of a convolution that the C kernel takes."""

# -- the convolution ---------------------------------------------------------------------------------------------------


def causal_convolution(x: Tensor, weight: Tensor, history: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``y[:, t, c] = sum_i weight[c, i] * input[:, t - width + 1 + i, c]``, where ``history`` comes before ``x``.

    ``x``: ``[batch, time, dim]``. ``weight``: ``[dim, width]``, its last column on the current token.
    ``history``: ``[batch, width - 1, dim]``, the inputs before ``x``; zeros if ``None``.
    Returns ``[batch, time, dim]``. Raises ``ValueError`` for shapes or devices that do not fit, ``TypeError`` for
    dtypes that differ.
    """
    given = (("x", x), ("weight", weight), ("history", history))
    expect_tensors("causal_convolution", *given[: 2 if history is None else 3])
    if weight.dim() != 2 or x.dim() != 3 or weight.shape[0] != x.shape[-1] or weight.shape[1] < 1:
        raise ValueError(
            f"causal_convolution: x {list(x.shape)} and weight {list(weight.shape)}: "
            "expected [batch, time, dim] and [dim, width >= 1]"
        )
    before = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    if history is None:
        history = x.new_zeros(before)
    elif history.shape != before:
        raise ValueError(f"causal_convolution: history {list(history.shape)}: expected {list(before)}")
    return convolve(torch.cat((history, x), dim=1), weight, backend=backend)


def convolve(inputs: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """:func:`causal_convolution` of ``inputs`` ``[batch, width - 1 + time, dim]`` that begin with their history."""
    same = weight.dtype == inputs.dtype
    y: Tensor = _convolution.choose(backend, device=inputs.device.type, dtype=inputs.dtype, same=same)(inputs, weight)
    return y


def _convolve_reference(inputs: Tensor, weight: Tensor) -> Tensor:
    if inputs.shape[1] < weight.shape[1]:
        return inputs[:, :0] * weight[:, 0]  # a history and no token, which conv1d refuses
    return F.conv1d(inputs.transpose(1, 2), weight[:, None], groups=weight.shape[0]).transpose(1, 2)


def _convolve_torch(inputs: Tensor, weight: Tensor) -> Tensor:
    """A sum of shifted products, without conv1d's transpositions."""
    if transforming():
        return _convolve_reference(inputs, weight)
    if inputs.shape[1] == weight.shape[1]:
        return (inputs * weight.t()).sum(dim=1, keepdim=True)
    y: Tensor = _ShiftedSum.apply(inputs, weight)
    return y


class _ShiftedSum(torch.autograd.Function):
    """In tiles of time, so that neither direction streams the sequence through memory once per tap."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        taps = weight.t().contiguous()  # a tap is then one dense row
        y = inputs.new_empty(inputs.shape[0], inputs.shape[1] - len(taps) + 1, inputs.shape[2])
        for start, stop in _tiles(y):
            torch.mul(inputs[:, start:stop], taps[0], out=y[:, start:stop])
            for i in range(1, len(taps)):
                y[:, start:stop].addcmul_(inputs[:, start + i : stop + i], taps[i])
        ctx.save_for_backward(inputs, weight)
        return y

    @staticmethod
    @differentiable(lambda ctx, inputs, weight: _convolve_reference(inputs, weight))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        taps = weight.t().contiguous()
        grad_inputs, grad_taps = torch.zeros_like(inputs), torch.zeros_like(taps)
        for start, stop in _tiles(grad):
            g = grad[:, start:stop]
            for i in range(len(taps)):
                grad_inputs[:, start + i : stop + i].addcmul_(g, taps[i])
                grad_taps[i] += (g * inputs[:, start + i : stop + i]).sum((0, 1))
        return grad_inputs, grad_taps.t()


TILE = 2**18
"""Numbers of a tile, which then stays in a cache together with its results."""


def _tiles(y: Tensor) -> list[tuple[int, int]]:
    if torch.compiler.is_compiling():  # a compiler tiles by itself, and cannot count tiles of a symbolic length
        return [(0, y.shape[1])]
    size = max(1, TILE // max(1, y.shape[0] * y.shape[2]))
    return [(start, min(start + size, y.shape[1])) for start in range(0, y.shape[1], size)]


def _convolve_triton(inputs: Tensor, weight: Tensor) -> Tensor:
    from .triton import convolve

    return convolve(inputs, weight)


_convolution = Operation(
    "convolution",
    [
        Backend("triton", _convolve_triton, triton_runtime.refuse),
        Backend("torch", _convolve_torch),
        Backend("reference", _convolve_reference),
    ],
)

# -- queries, keys and values ------------------------------------------------------------------------------------------

QueryKeyValue: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor | None]"


def query_key_value(
    projected: Tensor,
    weight: Tensor | None,
    history: Tensor | None,
    heads: int,
    length: Tensor | None = None,
    *,
    backend: str = "auto",
) -> QueryKeyValue:
    """``q, k = l2_norm(silu(conv(x)))`` per head, ``v = silu(conv(x))``, and the next call's history.

    Args:
        projected: ``[batch, time, 3 * heads * dim]``: what becomes q, then k, then v; under autocast of half precision.
        weight: ``[3 * heads * dim, width]``, its last column on the current token; ``None``: no convolution.
        history: ``[batch, width - 1, 3 * heads * dim]``, what was projected before; ``None`` without a convolution.
        length: ``[batch]`` int64, the number of real tokens of each row; they come first, and the next history ends
            with the last of them. ``None``: every token is real.

    Returns:
        q, k, v ``[batch, time, heads, dim]`` in the dtype of ``weight``, and the next history, which shares no memory
        with ``projected``.

    Raises:
        ValueError: shapes do not fit.
    """
    if projected.dim() != 3 or projected.shape[2] % (3 * heads):
        raise ValueError(
            f"query_key_value: projected {list(projected.shape)}: expected [batch, time, 3 * {heads} * dim]"
        )
    if weight is not None:
        before = (projected.shape[0], weight.shape[-1] - 1, projected.shape[2])
        if weight.shape != (before[2], weight.shape[-1]):
            raise ValueError(f"query_key_value: weight {list(weight.shape)}: expected [{before[2]}, width]")
        if history is None or history.shape != before:
            found = None if history is None else list(history.shape)
            raise ValueError(f"query_key_value: history {found}: expected {list(before)}")
    if length is not None:
        if length.shape != projected.shape[:1] or length.dtype != torch.int64:
            raise ValueError(
                f"query_key_value: length {length.dtype} {list(length.shape)}: expected int64 [{projected.shape[0]}]"
            )
        # on other devices than a CPU, looking at values would wait
        if (
            length.is_cpu
            and not torch.compiler.is_compiling()
            and bool(((length < 0) | (length > projected.shape[1])).any())
        ):
            raise ValueError(f"query_key_value: length {length.tolist()}: expected 0 .. {projected.shape[1]}")
    if weight is not None and projected.is_cpu:
        projected = projected.to(weight.dtype)  # the kernel of a GPU reads half precision
    width, same = (1, True) if weight is None else (weight.shape[1], weight.dtype == projected.dtype)
    run = _query_key_value.choose(backend, projected, weight, history, length, width=width, same=same)
    q, k, v, after = run(projected, weight, history, heads, length)
    return q, k, v, history if after is None else after


def query(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, *, backend: str = "auto"
) -> Tensor:
    """The queries of a memory that is read without being written: every token comes right after the history.

    Args:
        projected: ``[batch, time, heads * dim]``.
        weight: ``[channels, width]``, its last column on the token; ``None``: no convolution.
        history: ``[batch, width - 1, channels]``: what was projected before; ``None`` without a convolution. The first
            ``heads * dim`` channels are the queries'.

    Returns:
        ``l2_norm(silu(conv(x)))`` per head: ``[batch, time, heads, dim]``.

    Raises:
        ValueError: shapes do not fit.
    """
    if projected.dim() != 3 or projected.shape[2] % heads:
        raise ValueError(f"query: projected {list(projected.shape)}: expected [batch, time, {heads} * dim]")
    if weight is not None:
        batch, channels = projected.shape[0], projected.shape[2]
        if weight.dim() != 2 or weight.shape[0] < channels or not weight.shape[1]:
            raise ValueError(f"query: weight {list(weight.shape)}: expected [at least {channels}, width >= 1]")
        if history is None or history.shape != (batch, weight.shape[1] - 1, weight.shape[0]):
            found = None if history is None else list(history.shape)
            raise ValueError(f"query: history {found}: expected {[batch, weight.shape[1] - 1, weight.shape[0]]}")
    if weight is not None and projected.is_cpu:
        projected = projected.to(weight.dtype)
    width, same = (1, True) if weight is None else (weight.shape[1], weight.dtype == projected.dtype)
    run = _query.choose(backend, projected, weight, history, width=width, same=same)
    q: Tensor = run(projected, weight, history, heads)
    return q


def _query_key_value_torch(
    projected: Tensor,
    weight: Tensor | None,
    history: Tensor | None,
    heads: int,
    length: Tensor | None,
    backend: str = "torch",
) -> QueryKeyValue:
    if weight is not None and history is not None:
        past, before = torch.cat((history, projected), dim=1), history.shape[1]
        if before:
            # a copy: a view would keep all inputs alive for as long as the state
            history = past[:, -before:].clone() if length is None else last(past, length + before, before)
        projected = convolve(past, weight, backend=backend)
    qk, v = F.silu(projected).unflatten(-1, (3, heads, -1)).split_with_sizes((2, 1), dim=2)
    q, k = l2_norm(qk, EPS, backend=backend).unbind(2)
    return q, k, v.squeeze(2), history


def _query_torch(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, backend: str = "torch"
) -> Tensor:
    if weight is not None and history is not None:
        channels = projected.shape[2]
        taps = weight[:channels].t()
        past = (history[..., :channels] * taps[:-1]).sum(1, keepdim=True)
        projected = torch.addcmul(past, projected, taps[-1])
    return l2_norm(F.silu(projected).unflatten(-1, (heads, -1)), EPS, backend=backend)


# -- the C kernel ------------------------------------------------------------------------------------------------------

_FORWARD = Kernel("query_key_value_forward", integers=26, doubles=1)
_BACKWARD = Kernel("query_key_value_backward", integers=26, doubles=1)


def _native(
    projected: Tensor,
    weight: Tensor | None,
    history: Tensor | None,
    heads: int,
    length: Tensor | None = None,
    *,
    outputs: int,
) -> Any:
    """q, k, v and the next history, or ``None``, for three ``outputs``; q for one."""
    length = None if length is None else length.contiguous()
    if weight is None or history is None:
        history = None
    elif history.dtype != projected.dtype:
        history = history.to(projected.dtype)
    if needs_grad(projected, weight, history):
        return _QueryKeyValue.apply(projected, weight, history, heads, length, outputs)
    if projected.stride(2) != 1:
        projected = projected.contiguous()
    if history is not None and history.stride(2) != 1:
        history = history.contiguous()
    weight = None if weight is None else weight.contiguous()
    (batch, time, channels), dtype = projected.shape, projected.dtype
    k = v = after = None
    if outputs == 1:
        q = empty_huge_pages((batch, time, heads, channels // heads), dtype)
    else:  # one piece of memory: large ones return to the system at once
        q, k, v = empty_huge_pages((3, batch, time, heads, channels // (3 * heads)), dtype).unbind()
        after = None if history is None else torch.empty(history.shape, dtype=dtype)
    _FORWARD(
        dtype, *_inputs(projected, weight, history, heads, length, outputs),
        *map(address, (q, k, v, after)), 0, 0, 0, 0, 0, 0, 0, EPS,
    )  # fmt: skip
    return q if outputs == 1 else (q, k, v, after)


def _formula(ctx: Any, projected: Tensor, weight: Tensor | None, history: Tensor | None) -> Any:
    if ctx.outputs == 1:
        return _query_torch(projected, weight, history, ctx.heads, "reference")
    return _query_key_value_torch(projected, weight, history, ctx.heads, ctx.length, "reference")


class _QueryKeyValue(torch.autograd.Function):
    """Keeps its inputs, and computes everything again in backward."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        *tensors, ctx.heads, ctx.length, ctx.outputs = given
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return _native(*given[:-1], outputs=ctx.outputs)

    @staticmethod
    @differentiable(_formula, stop=3)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # any strides: as they were given, or as hooks on saved tensors return them
        saved: Any = [None if x is None else x.contiguous() for x in ctx.saved_tensors]
        projected, weight, history = saved
        given = [None if grad is None else grad.contiguous() for grad in grads]
        *grad_qkv, grad_next = given if len(given) == 4 else (*given, None, None, None)
        grad_projected = empty_huge_pages(projected.shape, projected.dtype)
        if ctx.outputs == 1:  # of all channels, added to in the queries'
            grad_weight, grad_history = (None if x is None else torch.zeros_like(x) for x in (weight, history))
        else:
            grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            grad_history = torch.empty(history.shape, dtype=history.dtype) if ctx.needs_input_grad[2] else None
        _BACKWARD(
            projected.dtype, *_inputs(projected, weight, history, ctx.heads, ctx.length, ctx.outputs), 0, 0, 0, 0,
            *map(address, (*grad_qkv, grad_next, grad_projected, grad_history, grad_weight)), EPS,
        )  # fmt: skip
        return grad_projected, grad_weight, grad_history, None, None, None


def _inputs(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, length: Tensor | None, outputs: int
) -> tuple[int, ...]:
    """The first fields of ``struct call``, up to the length."""
    batch, time, channels = projected.shape
    return (
        torch.get_num_threads(), batch, time, heads, channels // (outputs * heads),
        1 if weight is None else weight.shape[1], outputs, projected.data_ptr(), address(history),
        *projected.stride()[:2], *((0, 0) if history is None else history.stride()[:2]), address(weight),
        address(length),
    )  # fmt: skip


def _refuse_native(*, width: int = 1, **facts: Any) -> str | None:
    if width > LONGEST:
        return f"takes at most {LONGEST} taps, not {width}"
    return library.refuse(**facts)


def _query_key_value_triton(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, length: Tensor | None
) -> Any:
    from .triton import query_key_value

    return query_key_value(projected, weight, history, heads, length, EPS)


def _query_triton(projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int) -> Tensor:
    from .triton import query

    return query(projected, weight, history, heads, EPS)


def _refuse_triton(*, same: bool = True, **facts: Any) -> str | None:
    """Its kernel takes tensors of several dtypes, as there are under autocast."""
    return triton_runtime.refuse(**facts)


def _outputs(projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, *others: Any) -> Any:
    q = projected.unflatten(-1, (3, heads, -1))[:, :, 0]
    return q, q, q, None if weight is None else history


_query_key_value = Operation(
    "query_key_value",
    [
        Backend("native", functools.partial(_native, outputs=3), _refuse_native, opaque=True),
        Backend("triton", _query_key_value_triton, _refuse_triton),
        Backend("torch", _query_key_value_torch),
        Backend("reference", functools.partial(_query_key_value_torch, backend="reference")),
    ],
    _outputs,
)
_query = Operation(
    "query",
    [
        Backend("native", functools.partial(_native, outputs=1), _refuse_native, opaque=True),
        Backend("triton", _query_triton, _refuse_triton),
        Backend("torch", _query_torch),
        Backend("reference", functools.partial(_query_torch, backend="reference")),
    ],
    lambda projected, weight, history, heads: projected.unflatten(-1, (heads, -1)),
)
