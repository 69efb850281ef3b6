"""One branch gating another, each normalised with a learned vector first (paper section 4.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import Backend, Operation
from .normalisation import rms_norm


def gate(a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """``rms_norm(a) * gain_a * sigmoid(rms_norm(b) * gain_b)``.

    ``a``, ``b``: ``[..., dim]`` of one shape; ``gain_a``, ``gain_b``: ``[dim]``. Raises ``ValueError`` otherwise.
    """
    if a.shape != b.shape:
        raise ValueError(f"gate: a {list(a.shape)} and b {list(b.shape)}: expected one shape")
    for name, gain in (("gain_a", gain_a), ("gain_b", gain_b)):
        if gain.shape != a.shape[-1:]:
            raise ValueError(f"gate: {name} {list(gain.shape)}: expected {list(a.shape[-1:])}")
    return _operation.choose(backend, device=a.device.type, dtype=a.dtype)(a, b, gain_a, gain_b, eps)


def _reference(a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor, eps: float) -> Tensor:
    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return rms_norm(x, gain, eps, backend="reference")

    return normed(a, gain_a) * torch.sigmoid(normed(b, gain_b))


def _torch(a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor, eps: float) -> Tensor:
    return rms_norm(a, gain_a, eps) * torch.sigmoid(rms_norm(b, gain_b, eps))


_operation = Operation("gate", [Backend("torch", _torch), Backend("reference", _reference)])


def silu_gate(y: Tensor, g: Tensor) -> Tensor:
    """``y * silu(g)`` for two tensors of one shape; backward keeps these two and computes ``silu`` again."""
    if y.dtype != g.dtype:  # under autocast
        return y * F.silu(g)
    if not torch.is_grad_enabled():
        return F.silu(g).mul_(y)
    return _SiluGate.apply(y, g)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(y, g)
        return F.silu(g).mul_(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, g = ctx.saved_tensors
        return F.silu(g).mul_(grad), torch.ops.aten.silu_backward(grad * y, g)
