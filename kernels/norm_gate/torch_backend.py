"""Norms and gates on PyTorch's operators: the fallback everywhere, and the references."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import differentiable
from ..dispatch import is_plain_cpu_tensor, needs_grad, transforming
from .form import GATE, NORM, SILU_GATE, Form


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if gain is not None and gain.dtype != x.dtype:  # under autocast
        wide = torch.promote_types(x.dtype, gain.dtype)
        return rms_norm(x.to(wide), gain.to(wide), eps).to(x.dtype)
    if _in_full(x) and not needs_grad(x, gain):  # PyTorch's RMS norm is nine operators on a CPU
        dim = x.shape[-1]
        zero, root = _constants(dim * eps, x.dtype)
        length = torch.linalg.vector_norm(x, 2, -1, True).hypot_(root)
        y = torch.addcdiv(zero, x, length, value=dim**0.5)
        return y if gain is None else y.mul_(gain)
    if _in_full(x):
        return _Normalize.apply(x, gain, x.shape[-1], eps)
    if gain is None or gain.shape == x.shape[-1:]:
        return F.rms_norm(x, x.shape[-1:], gain, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * gain


def rms_norm_reference(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    wide = _widen(x)
    y = wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (y if gain is None else y * gain).to(x.dtype)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    if _in_full(x) and not needs_grad(x):
        return x / torch.linalg.vector_norm(x, 2, -1, True).hypot_(_constants(eps, x.dtype)[1])
    if _in_full(x):
        return _Normalize.apply(x, None, 1, eps)
    # x / sqrt(sum + eps) = x / sqrt(mean + eps / dim) / sqrt(dim)
    dim = x.shape[-1]
    return F.rms_norm(x, (dim,), None, eps / dim) * dim**-0.5


def l2_norm_reference(x: Tensor, eps: float) -> Tensor:
    wide = _widen(x)
    return (wide / torch.sqrt(wide.square().sum(dim=-1, keepdim=True) + eps)).to(x.dtype)


def gate(a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor, eps: float) -> Tensor:
    return rms_norm(a, gain_a, eps) * torch.sigmoid(rms_norm(b, gain_b, eps))


def gate_reference(a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor, eps: float) -> Tensor:
    return rms_norm_reference(a, gain_a, eps) * torch.sigmoid(rms_norm_reference(b, gain_b, eps))


def gated_norm(y: Tensor, gain: Tensor, g: Tensor, eps: float) -> Tensor:
    return silu_gate(rms_norm(y, gain, eps).flatten(-2), g)


def gated_norm_reference(y: Tensor, gain: Tensor, g: Tensor, eps: float) -> Tensor:
    return rms_norm_reference(y, gain, eps).flatten(-2) * F.silu(g)


def swiglu(x: Tensor) -> Tensor:
    g, y = x.chunk(2, dim=-1)
    return silu_gate(y, g)


def swiglu_reference(x: Tensor) -> Tensor:
    g, y = x.chunk(2, dim=-1)
    return y * F.silu(g)


def silu_gate(y: Tensor, g: Tensor) -> Tensor:
    """``y * silu(g)`` for two tensors of one shape; backward keeps these two and computes ``silu`` again."""
    if y.dtype != g.dtype:  # under autocast
        return y * F.silu(g)
    if not torch.is_grad_enabled() or transforming():
        return F.silu(g) * y
    return _SiluGate.apply(y, g)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(y, g)
        return F.silu(g).mul_(y)

    @staticmethod
    @differentiable(lambda ctx, y, g: F.silu(g) * y)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, g = ctx.saved_tensors
        return F.silu(g).mul_(grad), torch.ops.aten.silu_backward(grad * y, g)


def _normalize_formula(ctx: Any, x: Tensor, gain: Tensor | None) -> Tensor:
    return formula(Form(NORM, 1, x.shape[-1], ctx.count, ctx.eps), x, None, gain, None)


class _Normalize(torch.autograd.Function):
    """``x / sqrt(sum(x^2) / count + eps) * gain``; backward keeps the input and one number per vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, count: int, eps: float) -> Tensor:
        # count^0.5 / sqrt(|x|^2 + count eps), whose root of a sum of squares cannot overflow
        length = torch.linalg.vector_norm(x, 2, -1, True).hypot_(_constants(count * eps, x.dtype)[1])
        inverse = length.reciprocal_().mul_(count**0.5)
        y = x * inverse
        ctx.save_for_backward(x, gain, inverse)
        ctx.count, ctx.eps = count, eps
        return y if gain is None else y.mul_(gain)

    @staticmethod
    @differentiable(_normalize_formula, stop=2)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        grad_gain, grad_normed = None, grad
        if gain is not None:
            grad_normed = grad * gain
            if ctx.needs_input_grad[1]:
                grad_gain = (grad * x).mul_(inverse).sum_to_size(gain.shape)
        along = torch.linalg.vecdot(grad_normed, x).unsqueeze(-1) * inverse.square().mul_(inverse).mul_(-1 / ctx.count)
        return torch.addcmul(grad_normed * inverse, x, along), grad_gain, None, None


def formula(
    form: Form, a: Tensor, b: Tensor | None = None, gain_a: Tensor | None = None, gain_b: Tensor | None = None
) -> Tensor:
    """Any form, in differentiable operators."""

    def norm(x: Tensor, gain: Tensor | None) -> Tensor:
        y = x / torch.sqrt(x.square().sum(dim=-1, keepdim=True) / form.divisor + form.eps)
        return y if gain is None else y * gain

    if form.kind == NORM:
        return norm(a, gain_a)
    assert b is not None
    if form.kind == GATE:
        return norm(a, gain_a) * torch.sigmoid(norm(b, gain_b))
    return (a if form.kind == SILU_GATE else norm(a, gain_a)).reshape(b.shape) * F.silu(b)


def _in_full(x: Tensor) -> bool:
    """A CPU tensor in float32 or float64, outside of compilers: where the function above pays."""
    return x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling() and is_plain_cpu_tensor(x)


@functools.lru_cache(maxsize=64)
def _constants(square: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zero, and the root of a number, as tensors: operators would make a tensor of a number at every call."""
    with torch.inference_mode(False):
        zero, root = torch.zeros((), dtype=dtype, device="cpu"), torch.tensor(square**0.5, dtype=dtype, device="cpu")
        return zero, root


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
