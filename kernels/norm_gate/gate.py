"""One branch gating another: normalised vectors, and the products inside feed-forward and memory blocks."""

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
from .form import GATE, GATED_NORM, SILU_GATE, Form
from .norm import rms_norm


def gate(a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """``rms_norm(a) * gain_a * sigmoid(rms_norm(b) * gain_b)`` (paper section 4.2).

    ``a``, ``b``: ``[..., dim]`` of one shape; ``gain_a``, ``gain_b``: ``[dim]``. Raises ``ValueError`` otherwise.
    """
    if a.shape != b.shape:
        raise ValueError(f"gate: a {list(a.shape)} and b {list(b.shape)}: expected one shape")
    for name, gain in (("gain_a", gain_a), ("gain_b", gain_b)):
        if gain.shape != a.shape[-1:]:
            raise ValueError(f"gate: {name} {list(gain.shape)}: expected {list(a.shape[-1:])}")
    return _choose(_gate, backend, a, b, gain_a, gain_b)(a, b, gain_a, gain_b, eps)


def prepare_gate(
    gain_a: Tensor, gain_b: Tensor, shape: tuple[int, ...], eps: float = 1e-6
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """``gate`` for many times dense ``a`` and ``b`` ``[*shape, dim]``, or ``None`` where that gains nothing.

    As ``projection.prepare_projection`` does it: without gradients, into one tensor.
    """
    x = gain_a.new_empty((*shape, gain_a.numel()))
    if not prepares(gain_a, gain_b) or _choose(_gate, "auto", x, gain_a, gain_b) is not _gate_native:
        return None
    dim = gain_a.numel()
    return native_gated.prepare_gated(Form(GATE, 1, dim, dim, eps), x, gain_a, gain_b)


def gated_norm(y: Tensor, gain: Tensor, g: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """``rms_norm(y) * gain * silu(g)``, heads side by side.

    ``y``: ``[..., heads, dim]``; ``gain``: ``[heads, dim]``; ``g`` and the result: ``[..., heads * dim]``. Raises
    ``ValueError`` otherwise.
    """
    if gain.shape != y.shape[-2:]:
        raise ValueError(f"gated_norm: gain {list(gain.shape)}: expected {list(y.shape[-2:])}")
    if g.shape != (*y.shape[:-2], gain.numel()):
        raise ValueError(f"gated_norm: g {list(g.shape)}: expected {[*y.shape[:-2], gain.numel()]}")
    return _choose(_gated_norm, backend, y, gain, g)(y, gain, g, eps)


def swiglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """``silu(x[..., :hidden]) * x[..., hidden:]``: ``[..., 2 * hidden]`` -> ``[..., hidden]``.

    Raises ``ValueError`` where the last dimension is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu: x {list(x.shape)}: expected [..., 2 * hidden]")
    return _choose(_swiglu, backend, x)(x)


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


# -- backends ----------------------------------------------------------------------------------------------------------


def _choose(operation: Operation, backend: str, x: Tensor, *others: Tensor) -> Any:
    return operation.choose(
        backend,
        device=x.device.type,
        dtype=x.dtype,
        same=all(other.dtype == x.dtype for other in others),
        plain=plain(x, *others),
    )


def _gate_native(a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor, eps: float) -> Tensor:
    dim = a.shape[-1]
    return native_gated.gated(Form(GATE, 1, dim, dim, eps), a, b, gain_a, gain_b)


def _gate_triton(a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor, eps: float) -> Tensor:
    from .triton import gated

    dim = a.shape[-1]
    return gated(Form(GATE, 1, dim, dim, eps), a, b, gain_a, gain_b)


def _gate_torch(a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor, eps: float, backend: str = "torch") -> Tensor:
    return rms_norm(a, gain_a, eps, backend=backend) * torch.sigmoid(rms_norm(b, gain_b, eps, backend=backend))


def _gated_norm_native(y: Tensor, gain: Tensor, g: Tensor, eps: float) -> Tensor:
    heads, dim = gain.shape
    return native_gated.gated(Form(GATED_NORM, heads, dim, dim, eps), y, g, gain)


def _gated_norm_triton(y: Tensor, gain: Tensor, g: Tensor, eps: float) -> Tensor:
    from .triton import gated

    heads, dim = gain.shape
    return gated(Form(GATED_NORM, heads, dim, dim, eps), y, g, gain)


def _gated_norm_torch(y: Tensor, gain: Tensor, g: Tensor, eps: float) -> Tensor:
    return silu_gate(rms_norm(y, gain, eps, backend="torch").flatten(-2), g)


def _gated_norm_reference(y: Tensor, gain: Tensor, g: Tensor, eps: float) -> Tensor:
    return rms_norm(y, gain, eps, backend="reference").flatten(-2) * F.silu(g)


def _swiglu_triton(x: Tensor) -> Tensor:
    from .triton import gated

    g, y = x.chunk(2, dim=-1)
    return gated(Form(SILU_GATE, 1, y.shape[-1]), y, g)


def _swiglu_torch(x: Tensor) -> Tensor:
    g, y = x.chunk(2, dim=-1)
    return silu_gate(y, g)


def _swiglu_reference(x: Tensor) -> Tensor:
    g, y = x.chunk(2, dim=-1)
    return y * F.silu(g)


def _backends(native: Any, fused: Any, torch_: Any, reference: Any) -> list[Backend]:
    return [
        Backend("native", native, native_gated.refuse, opaque=True),
        Backend("triton", fused, triton.refuse),
        Backend("torch", torch_),
        Backend("reference", reference),
    ]


_gate_reference = functools.partial(_gate_torch, backend="reference")

_gate = Operation("gate", _backends(_gate_native, _gate_triton, _gate_torch, _gate_reference), lambda a, b, *others: a)
_gated_norm = Operation(
    "gated_norm",
    _backends(_gated_norm_native, _gated_norm_triton, _gated_norm_torch, _gated_norm_reference),
    lambda y, gain, g, eps: g,
)
_swiglu = Operation(
    "swiglu",
    _backends(native_gated.swiglu, _swiglu_triton, _swiglu_torch, _swiglu_reference),
    lambda x: x[..., : x.shape[-1] // 2],
)
