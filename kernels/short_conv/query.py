"""Queries of a memory that learns nothing meanwhile: each token is asked as if it came right after the history."""

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
from .query_key_value import laid_out

EPS = 1e-6


def query(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, *, backend: str = "auto"
) -> Tensor:
    """``l2_norm(silu(conv(x)))`` per head, the convolution over the history and the token alone.

    Args:
        projected: ``[batch, time, heads * dim]``.
        weight: ``[channels, width]``, its last column on the token; ``None``: no convolution.
        history: ``[batch, width - 1, channels]``: what was projected before; ``None`` without a convolution. The first
            ``heads * dim`` channels are the queries'.

    Returns:
        ``[batch, time, heads, dim]``.

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
    run = _operation.choose(
        backend,
        device=projected.device.type,
        dtype=projected.dtype,
        same=weight is None or weight.dtype == projected.dtype,
        plain=plain(projected, weight, history),
    )
    y: Tensor = run(projected, weight, history, heads)
    return y


def _composed(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, backend: str = "torch"
) -> Tensor:
    if weight is not None and history is not None:
        channels = projected.shape[2]
        taps = weight[:channels].t()
        past = (history[..., :channels] * taps[:-1]).sum(1, keepdim=True)
        projected = torch.addcmul(past, projected, taps[-1])
    return l2_norm(F.silu(projected).unflatten(-1, (heads, -1)), EPS, backend=backend)


def _native(projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int) -> Tensor:
    if weight is None or history is None:
        given = None
    else:
        given = history if history.dtype == projected.dtype else history.to(projected.dtype)
    if not tracks(projected, weight, given):
        return _forward(*laid_out(projected, weight, given), heads)
    y: Tensor = _Query.apply(projected, weight, given, heads)
    return y


def _refuse(*, same: bool = True, **facts: Any) -> str | None:
    return library.refuse(**facts) if same else "takes one dtype"


class _Query(torch.autograd.Function):
    """Keeps its inputs, and computes everything again: one pass over memory each way."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int) -> Tensor:
        given = laid_out(projected, weight, history)
        ctx.save_for_backward(*given)
        ctx.heads = heads
        return _forward(*given, heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # hooks on saved tensors may give them back laid out otherwise
        saved: Any = [None if x is None else x.contiguous() for x in ctx.saved_tensors]
        projected, weight, history = saved
        grad = grad.contiguous()
        grad_projected = fresh(projected.shape, projected.dtype)
        # of the channels that are not the queries', and to add to
        grad_weight, grad_history = (None if x is None else torch.zeros_like(x) for x in (weight, history))
        _BACKWARD(
            projected.dtype,
            *_shape(projected, weight, history, ctx.heads), 0, grad.data_ptr(),
            *map(address, (grad_projected, grad_history, grad_weight)),
            EPS,
        )  # fmt: skip
        return grad_projected, grad_weight, grad_history, None


def _forward(projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int) -> Tensor:
    y = fresh((*projected.shape[:2], heads, projected.shape[2] // heads), projected.dtype)
    _FORWARD(projected.dtype, *_shape(projected, weight, history, heads), y.data_ptr(), 0, 0, 0, 0, EPS)
    return y


def _shape(projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int) -> tuple[int, ...]:
    """The first fields of ``struct call``, up to the weight."""
    batch, time, channels = projected.shape
    width, all_channels = (1, 0) if weight is None else weight.shape[::-1]
    return (
        torch.get_num_threads(), batch, time, heads, channels // heads, width, all_channels,
        projected.data_ptr(), address(history), *projected.stride()[:2],
        *((0, 0) if history is None else history.stride()[:2]), address(weight),
    )  # fmt: skip


_FORWARD = Kernel("query_forward", 19, 1)
_BACKWARD = Kernel("query_backward", 19, 1)

_operation = Operation(
    "query",
    [
        Backend("native", _native, _refuse, opaque=True),
        Backend("torch", _composed),
        Backend("reference", functools.partial(_composed, backend="reference")),
    ],
    lambda projected, weight, history, heads: projected.unflatten(-1, (heads, -1)),
)
