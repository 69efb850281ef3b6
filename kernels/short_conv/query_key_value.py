"""From a token's projection to its query, key and value: convolution, SiLU and unit length (paper 4.4)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, plain, tracks
from ..cpu_runtime.huge_pages import fresh
from ..dispatch import Backend, Operation
from ..norm_gate.norm import l2_norm
from ..padding import last
from .convolution import convolve

EPS = 1e-6
LONGEST = 64
"""Taps of a convolution that the C kernel takes."""

QueryKeyValue = tuple[Tensor, Tensor, Tensor, Tensor | None]


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
        projected: ``[batch, time, 3 * heads * dim]``: what becomes q, then k, then v.
        weight: ``[3 * heads * dim, width]``, its last column on the current token; ``None``: no convolution.
        history: ``[batch, width - 1, 3 * heads * dim]``, what was projected before; ``None`` without a convolution.
        length: ``[batch]`` int64: the tokens of each row that are real, all before those that are not, which the next
            history leaves out; ``None``: every token is.

    Returns:
        q, k, v ``[batch, time, heads, dim]``, and the next history, which shares no memory with ``projected``.

    Raises:
        ValueError: shapes do not fit.
    """
    if projected.dim() != 3 or projected.shape[2] % (3 * heads):
        raise ValueError(
            f"query_key_value: projected {list(projected.shape)}: expected [batch, time, 3 * {heads} * dim]"
        )
    width = 1
    if weight is not None:
        width = weight.shape[-1]
        before = (projected.shape[0], width - 1, projected.shape[2])
        if weight.shape != (before[2], width):
            raise ValueError(f"query_key_value: weight {list(weight.shape)}: expected [{before[2]}, width]")
        if history is None or history.shape != before:
            found = None if history is None else list(history.shape)
            raise ValueError(f"query_key_value: history {found}: expected {list(before)}")
    if length is not None and (length.shape != projected.shape[:1] or length.dtype != torch.int64):
        raise ValueError(
            f"query_key_value: length {length.dtype} {list(length.shape)}: expected int64 [{projected.shape[0]}]"
        )
    if (
        length is not None
        and not (length.is_meta or torch.compiler.is_compiling())  # there are no values to look at
        and bool(((length < 0) | (length > projected.shape[1])).any())
    ):
        raise ValueError(f"query_key_value: length {length.tolist()}: expected 0 .. {projected.shape[1]}")
    run = _operation.choose(
        backend,
        device=projected.device.type,
        dtype=projected.dtype,
        width=width,
        same=weight is None or weight.dtype == projected.dtype,
        plain=plain(projected, weight, history, length),
    )
    return run(projected, weight, history, heads, length)


def _composed(
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


def _native(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, length: Tensor | None
) -> QueryKeyValue:
    if weight is None:
        given = None
    else:
        given = history if history is None or history.dtype == projected.dtype else history.to(projected.dtype)
    length = None if length is None else length.contiguous()
    if tracks(projected, weight, given):
        *qkv, after = _QueryKeyValue.apply(projected, weight, given, heads, length)
    else:
        *qkv, after = _forward(*laid_out(projected, weight, given), heads, length)
    q, k, v = qkv
    return q, k, v, history if after is None else after


def _refuse(*, width: int = 1, same: bool = True, **facts: Any) -> str | None:
    if width > LONGEST:
        return f"takes at most {LONGEST} taps, not {width}"
    if not same:
        return "takes one dtype"
    return library.refuse(**facts)


class _QueryKeyValue(torch.autograd.Function):
    """Keeps its inputs, and computes everything again: one pass over memory each way."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, length: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        given = laid_out(projected, weight, history)
        ctx.save_for_backward(*given, length)
        ctx.heads = heads
        ctx.set_materialize_grads(False)
        return _forward(*given, heads, length)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # hooks on saved tensors may give them back laid out otherwise
        saved: Any = [None if x is None else x.contiguous() for x in ctx.saved_tensors]
        projected, weight, history, length = saved
        *given, grad_next = (None if grad is None else grad.contiguous() for grad in grads)
        grad_projected = fresh(projected.shape, projected.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_history = torch.empty(history.shape, dtype=history.dtype) if ctx.needs_input_grad[2] else None
        _BACKWARD(
            projected.dtype,
            *_shape(projected, weight, history, ctx.heads, length),
            0, 0, 0, 0,
            *map(address, (*given, grad_next, grad_projected, grad_history, grad_weight)),
            EPS,
        )  # fmt: skip
        return grad_projected, grad_weight, grad_history, None, None


def _forward(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, length: Tensor | None
) -> tuple[Tensor | None, ...]:
    batch, time, channels = projected.shape
    each = (3, batch, time, heads, channels // (3 * heads))
    dtype = projected.dtype
    # in one piece: they live and die together, and large pieces go back to the system at once
    q, k, v = fresh(each, dtype).unbind()
    after = None if history is None else torch.empty(history.shape, dtype=dtype)
    _FORWARD(
        dtype,
        *_shape(projected, weight, history, heads, length),
        q.data_ptr(), k.data_ptr(), v.data_ptr(), address(after), 0, 0, 0, 0, 0, 0, 0, EPS,
    )  # fmt: skip
    return q, k, v, after


def laid_out(
    projected: Tensor, weight: Tensor | None, history: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As the kernel takes them: numbers side by side, and the weight dense."""
    if projected.stride(2) != 1:
        projected = projected.contiguous()
    if history is not None and history.stride(2) != 1:
        history = history.contiguous()
    return projected, None if weight is None else weight.contiguous(), history


def _shape(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, length: Tensor | None
) -> tuple[int, ...]:
    """The first fields of ``struct call``, up to the length."""
    batch, time, channels = projected.shape
    batch_step, time_step, _ = projected.stride()
    history_batch, history_time, _ = (0, 0, 0) if history is None else history.stride()
    return (
        torch.get_num_threads(), batch, time, heads, channels // (3 * heads), 1 if weight is None else weight.shape[1],
        projected.data_ptr(), address(history), batch_step, time_step, history_batch, history_time,
        address(weight), address(length),
    )  # fmt: skip


def _outputs(projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, *others: Any) -> Any:
    q = projected.unflatten(-1, (3, heads, -1))[:, :, 0]
    return q, q, q, history


_FORWARD = Kernel("query_key_value_forward", 25, 1)
_BACKWARD = Kernel("query_key_value_backward", 25, 1)

_operation = Operation(
    "query_key_value",
    [
        Backend("native", _native, _refuse, opaque=True),
        Backend("torch", _composed),
        Backend("reference", functools.partial(_composed, backend="reference")),
    ],
    _outputs,
)
