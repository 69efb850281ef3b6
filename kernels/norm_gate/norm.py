"""Normalising a vector to unit root mean square, or to unit length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu_runtime.call import plain, prepares
from ..dispatch import Backend, Operation
from ..triton_runtime import availability as triton
from . import cpu as native_gated
from .form import NORM, Form


def rms_norm(x: Tensor, gain: Tensor | None = None, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last dimension.

    ``x``: ``[..., dim]``, float; half precision is normalised in float32 and returned as it came.
    ``gain``: broadcasts against ``x`` from the right (``[dim]``, or ``[heads, dim]``), or ``None``.
    """
    if gain is not None and gain.dtype != x.dtype:  # under autocast
        wide = torch.promote_types(x.dtype, gain.dtype)
        return rms_norm(x.to(wide), gain.to(wide), eps, backend=backend).to(x.dtype)
    return _choose(_rms_norm, backend, x, gain)(x, gain, eps)


def l2_norm(x: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last dimension: finite with finite gradients at zero.

    ``x``: ``[..., dim]``, float; half precision is normalised in float32 and returned as it came.
    """
    return _choose(_l2_norm, backend, x)(x, eps)


def prepare_rms_norm(gain: Tensor, shape: tuple[int, ...], eps: float = 1e-6) -> Callable[[Tensor], Tensor] | None:
    """``rms_norm`` for many times a dense ``x`` ``[*shape, dim]`` and a gain ``[dim]``, or ``None`` if that gains
    nothing. As ``projection.prepare_projection`` does it: without gradients, into one tensor.
    """
    x = gain.new_empty((*shape, gain.numel()))
    if not prepares(gain) or _choose(_rms_norm, "auto", x, gain) is not _rms_native:
        return None
    run = native_gated.prepare_gated(Form(NORM, 1, gain.numel(), gain.numel(), eps), x, gain)
    return lambda x: run(x, None)


def _choose(operation: Operation, backend: str, x: Tensor, gain: Tensor | None = None) -> Any:
    return operation.choose(backend, device=x.device.type, dtype=x.dtype, plain=plain(x, gain))


def _rms_in_one_pass(gated: Callable[..., Tensor], x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    dim, heads = x.shape[-1], 1
    if gain is not None:
        gain = gain.expand(dim) if gain.dim() == 0 else gain
        if gain.dim() > x.dim() or gain.shape != x.shape[x.dim() - gain.dim() :]:
            shape = torch.broadcast_shapes(x.shape, gain.shape)
            x, gain = x.expand(shape), gain.expand(shape[-gain.dim() :])
        heads = gain.numel() // dim
    return gated(Form(NORM, heads, dim, dim, eps), x, None, gain)


def _rms_native(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return _rms_in_one_pass(native_gated.gated, x, gain, eps)


def _rms_triton(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    from .triton import gated

    return _rms_in_one_pass(gated, x, gain, eps)


def _rms_reference(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    wide = _widen(x)
    y = wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (y if gain is None else y * gain).to(x.dtype)


def _rms_torch(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if _few_steps(x, gain):
        dim = x.shape[-1]
        zero, root = _constants(dim * eps, x.dtype)
        length = torch.linalg.vector_norm(x, 2, -1, True).hypot_(root)
        return torch.addcdiv(zero, x if gain is None else x * gain, length, value=dim**0.5)
    if _whole(x):
        return _Normalised.apply(x, gain, x.shape[-1], eps)
    if gain is None or gain.shape == x.shape[-1:]:
        return F.rms_norm(x, x.shape[-1:], gain, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * gain


def _l2_native(x: Tensor, eps: float) -> Tensor:
    return native_gated.gated(Form(NORM, 1, x.shape[-1], 1, eps), x)


def _l2_triton(x: Tensor, eps: float) -> Tensor:
    from .triton import gated

    return gated(Form(NORM, 1, x.shape[-1], 1, eps), x)


def _l2_reference(x: Tensor, eps: float) -> Tensor:
    wide = _widen(x)
    return (wide / torch.sqrt(wide.square().sum(dim=-1, keepdim=True) + eps)).to(x.dtype)


def _l2_torch(x: Tensor, eps: float) -> Tensor:
    if _few_steps(x, None):
        return x / torch.linalg.vector_norm(x, 2, -1, True).hypot_(_constants(eps, x.dtype)[1])
    if _whole(x):
        return _Normalised.apply(x, None, 1, eps)
    # l2 is rms with its own scale: x / sqrt(sum + eps) = x / sqrt(mean + eps / dim) / sqrt(dim)
    dim = x.shape[-1]
    return F.rms_norm(x, (dim,), None, eps / dim) * dim**-0.5


class _Normalised(torch.autograd.Function):
    """``x / sqrt(sum(x^2) / count + eps) * gain``: backward needs the input and one number per vector, and no more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, count: int, eps: float) -> Tensor:
        # count^0.5 / sqrt(|x|^2 + count eps), the root of a sum of squares taken without leaving the range of numbers
        length = torch.linalg.vector_norm(x, 2, -1, True).hypot_(_constants(count * eps, x.dtype)[1])
        inverse = length.reciprocal_().mul_(count**0.5)
        y = x * inverse
        ctx.save_for_backward(x, gain, inverse)
        ctx.count = count
        return y if gain is None else y.mul_(gain)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        grad_gain = None
        pushed = grad
        if gain is not None:
            pushed = grad * gain
            if ctx.needs_input_grad[1]:
                grad_gain = (grad * x).mul_(inverse).sum_to_size(gain.shape)
        along = torch.linalg.vecdot(pushed, x).unsqueeze(-1) * inverse.square().mul_(inverse).mul_(-1 / ctx.count)
        return torch.addcmul(pushed * inverse, x, along), grad_gain, None, None


def _whole(x: Tensor) -> bool:
    """Where the function above runs: on a CPU, in full precision, and outside of a graph that is being traced."""
    return x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling() and plain(x)


def _few_steps(x: Tensor, gain: Tensor | None) -> bool:
    """On a CPU, PyTorch's RMS norm is nine operators, which for one token cost more to start than to run."""
    if torch.is_grad_enabled() and (x.requires_grad or (gain is not None and gain.requires_grad)):
        return False
    return _whole(x)


@functools.lru_cache(maxsize=64)
def _constants(square: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zero, and the root of a number, as tensors: a number would be made into one at every call."""
    with torch.inference_mode(False):
        zero, root = torch.zeros((), dtype=dtype, device="cpu"), torch.tensor(square**0.5, dtype=dtype, device="cpu")
        return zero, root


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


_rms_norm = Operation(
    "rms_norm",
    [
        Backend("native", _rms_native, native_gated.refuse, opaque=True),
        Backend("triton", _rms_triton, triton.refuse),
        Backend("torch", _rms_torch),
        Backend("reference", _rms_reference),
    ],
    lambda x, gain, eps: x if gain is None else x.expand(torch.broadcast_shapes(x.shape, gain.shape)),
)
_l2_norm = Operation(
    "l2_norm",
    [
        Backend("native", _l2_native, native_gated.refuse, opaque=True),
        Backend("triton", _l2_triton, triton.refuse),
        Backend("torch", _l2_torch),
        Backend("reference", _l2_reference),
    ],
    lambda x, eps: x,
)
