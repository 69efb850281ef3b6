"""Norms and gates: RMS and L2 norm, the gate of two normalized branches, gated norm, and SwiGLU.

All are ``y = norm(a) * f(norm(b))`` with one or both of its parts, a ``Form`` (form.py), and each fused backend is one
kernel for every form, in one pass over memory each way: ``native`` (cpu.c) on CPUs, ``triton`` (triton.py) on GPUs.
``torch`` and ``reference`` are in torch_backend.py. Half precision is normalized in float32 and returned in its own
dtype. As in ``torch.nn.functional.rms_norm``, a vector of finite numbers whose squares overflow (elements above 1e19 in
float32) becomes zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import triton_runtime
from ..autograd import differentiable
from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, empty_huge_pages
from ..dispatch import Backend, Operation, needs_grad
from . import torch_backend
from .form import GATE, GATED_NORM, NORM, SILU_GATE, Form


def rms_norm(x: Tensor, gain: Tensor | None = None, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last dimension.

    ``x``: ``[..., dim]``. ``gain``: broadcasts against ``x`` from the right (``[dim]``, or ``[heads, dim]``), or
    ``None``.
    """
    dim, heads = x.shape[-1], 1
    if gain is not None:
        gain = gain.expand(dim) if gain.dim() == 0 else gain
        if gain.dim() > x.dim() or gain.shape != x.shape[x.dim() - gain.dim() :]:
            shape = torch.broadcast_shapes(x.shape, gain.shape)
            x, gain = x.expand(shape), gain.expand(shape[-gain.dim() :])
        heads = gain.numel() // max(dim, 1)
    result: Tensor = RMS_NORM.choose(backend, x, gain)(Form(NORM, heads, dim, dim, eps), x, None, gain, None)
    return result


def l2_norm(x: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last dimension: finite, with finite gradients, at zero."""
    result: Tensor = _L2_NORM.choose(backend, x)(Form(NORM, 1, x.shape[-1], 1, eps), x, None, None, None)
    return result


def gate(a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """``rms_norm(a) * gain_a * sigmoid(rms_norm(b) * gain_b)`` (paper section 4.2).

    ``a``, ``b``: ``[..., dim]`` of one shape; ``gain_a``, ``gain_b``: ``[dim]``. Raises ``ValueError`` otherwise.
    """
    if a.shape != b.shape:
        raise ValueError(f"gate: a {list(a.shape)} and b {list(b.shape)}: expected one shape")
    dim = a.shape[-1]
    for name, gain in (("gain_a", gain_a), ("gain_b", gain_b)):
        if gain.shape != (dim,):
            raise ValueError(f"gate: {name} {list(gain.shape)}: expected [{dim}]")
    run = GATE_OPERATION.choose(backend, a, b, gain_a, gain_b)
    result: Tensor = run(Form(GATE, 1, dim, dim, eps), a, b, gain_a, gain_b)
    return result


def gated_norm(y: Tensor, gain: Tensor, g: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """``rms_norm(y) * gain * silu(g)``, heads side by side.

    ``y``: ``[..., heads, dim]``; ``gain``: ``[heads, dim]``; ``g`` and the result: ``[..., heads * dim]``. Raises
    ``ValueError`` otherwise.
    """
    if gain.shape != y.shape[-2:]:
        raise ValueError(f"gated_norm: gain {list(gain.shape)}: expected {list(y.shape[-2:])}")
    if g.shape != (*y.shape[:-2], gain.numel()):
        raise ValueError(f"gated_norm: g {list(g.shape)}: expected {[*y.shape[:-2], gain.numel()]}")
    heads, dim = gain.shape
    result: Tensor = _GATED_NORM.choose(backend, y, gain, g)(Form(GATED_NORM, heads, dim, dim, eps), y, g, gain, None)
    return result


def swiglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """``silu(x[..., :hidden]) * x[..., hidden:]``: ``[..., 2 * hidden]`` -> ``[..., hidden]``.

    Raises ``ValueError`` where the last dimension is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu: x {list(x.shape)}: expected [..., 2 * hidden]")
    result: Tensor = _SWIGLU.choose(backend, x)(x)
    return result


# -- the C kernel ------------------------------------------------------------------------------------------------------

FORWARD = Kernel("gated_forward", integers=20, doubles=2)
_BACKWARD = Kernel("gated_backward", integers=20, doubles=2)


def gated(
    form: Form, a: Tensor, b: Tensor | None = None, gain_a: Tensor | None = None, gain_b: Tensor | None = None
) -> Tensor:
    """``norm(a) * f(norm(b))`` in the shape of ``b``, or of ``a`` without one; gains are ``[heads, dim]``."""
    if needs_grad(a, b, gain_a, gain_b):
        y: Tensor = _Gated.apply(form, a, b, gain_a, gain_b)
        return y
    kind, heads, dim, divisor, eps = form
    width = heads * dim
    y = empty_huge_pages(a.shape if b is None else b.shape, a.dtype)
    a, a_step = _rows(a, width)
    b, b_step = _rows(b, width)
    gain_a = None if gain_a is None else gain_a.contiguous()
    gain_b = None if gain_b is None else gain_b.contiguous()
    FORWARD(
        a.dtype, kind, torch.get_num_threads(), a.numel() // max(width, 1), heads, dim,
        a.data_ptr(), address(b), a_step, b_step, address(gain_a), address(gain_b), y.data_ptr(),
        0, 0, 0, 0, 0, 0, 0, 0, divisor, eps,
    )  # fmt: skip
    return y


class _Gated(torch.autograd.Function):
    """Keeps its inputs alone, which exist anyway."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, a: Tensor, b: Tensor | None, gain_a: Tensor | None, gain_b: Tensor | None
    ) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(a, b, gain_a, gain_b)
        return gated(form, a, b, gain_a, gain_b)

    @staticmethod
    @differentiable(lambda ctx, *tensors: torch_backend.formula(ctx.form, *tensors), first=1)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *gains = ctx.saved_tensors
        # hooks on saved tensors may return other strides
        gains = [None if gain is None else gain.contiguous() for gain in gains]
        grads = [None if x is None else empty_huge_pages(x.shape, a.dtype) for x in (a, b)]
        for gain, wanted in zip(gains, ctx.needs_input_grad[3:]):
            grads.append(None if gain is None or not wanted else a.new_empty(gain.shape))
        _backward(ctx.form, grad, [a, b, *gains], grads)
        return None, *grads


def _swiglu_native(x: Tensor) -> Tensor:
    if needs_grad(x):
        y: Tensor = _SwiGLU.apply(x)
        return y
    gate, up = x.chunk(2, dim=-1)
    return gated(Form(SILU_GATE, 1, gate.shape[-1]), up, gate)


class _SwiGLU(torch.autograd.Function):
    """Both gradients go where they belong: the halves of one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu_native(x)

    @staticmethod
    @differentiable(lambda ctx, x: torch_backend.swiglu_reference(x))
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = empty_huge_pages(x.shape, x.dtype)
        (gate, up), (grad_gate, grad_up) = x.chunk(2, dim=-1), grad_x.chunk(2, dim=-1)
        form = Form(SILU_GATE, 1, gate.shape[-1])
        _backward(form, grad, [up, gate, None, None], [grad_up, grad_gate, None, None])
        return grad_x


def _backward(form: Form, grad: Tensor, inputs: list[Any], grads: list[Any]) -> None:
    """``inputs``, and their gradients, which are filled: of ``a``, ``b`` and the gains, each perhaps ``None``."""
    kind, heads, dim, divisor, eps = form
    (a, b, gain_a, gain_b), (grad_a, grad_b, grad_gain_a, grad_gain_b) = inputs, grads
    rows = [_rows(x, heads * dim) for x in (a, b, grad, grad_a, grad_b)]
    (a, a_step), (b, b_step), (grad, grad_step), (grad_a, grad_a_step), (grad_b, grad_b_step) = rows
    _BACKWARD(
        a.dtype, kind, torch.get_num_threads(), a.numel() // max(heads * dim, 1), heads, dim,
        a.data_ptr(), address(b), a_step, b_step, address(gain_a), address(gain_b), 0,
        grad.data_ptr(), grad_step, grad_a.data_ptr(), address(grad_b), grad_a_step, grad_b_step,
        address(grad_gain_a), address(grad_gain_b), divisor, eps,
    )  # fmt: skip


def _rows(x: Any, width: int) -> tuple[Any, int]:
    """The tensor with each token's numbers side by side, and the step between tokens: a view if possible."""
    if x is None or x.is_contiguous():
        return x, width
    x = x.reshape(-1, width)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


# -- operations --------------------------------------------------------------------------------------------------------


def _triton(*arguments: Any) -> Tensor:
    from .triton import gated

    return gated(*arguments)


def _swiglu_triton(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return _triton(Form(SILU_GATE, 1, gate.shape[-1]), up, gate, None, None)


def _refuse_triton(*, same: bool = True, **facts: Any) -> str | None:
    """Its kernel takes tensors of several dtypes, as there are under autocast."""
    return triton_runtime.refuse(**facts)


def _operation(name: str, torch_: Callable[..., Tensor], reference: Callable[..., Tensor]) -> Operation:
    """Its backends take a form, ``a``, ``b``, and their gains ``[heads, dim]``, of which some are ``None``."""
    backends = [
        Backend("native", gated, library.refuse, opaque=True),
        Backend("triton", _triton, _refuse_triton),
        Backend("torch", torch_),
        Backend("reference", reference),
    ]
    return Operation(name, backends, lambda form, a, b, *gains: a if b is None else b, [Form])


RMS_NORM = _operation(
    "rms_norm",
    lambda form, x, b, gain, _: torch_backend.rms_norm(x, gain, form.eps),
    lambda form, x, b, gain, _: torch_backend.rms_norm_reference(x, gain, form.eps),
)
_L2_NORM = _operation(
    "l2_norm",
    lambda form, x, *others: torch_backend.l2_norm(x, form.eps),
    lambda form, x, *others: torch_backend.l2_norm_reference(x, form.eps),
)
GATE_OPERATION = _operation(
    "gate",
    lambda form, a, b, gain_a, gain_b: torch_backend.gate(a, b, gain_a, gain_b, form.eps),
    lambda form, a, b, gain_a, gain_b: torch_backend.gate_reference(a, b, gain_a, gain_b, form.eps),
)
_GATED_NORM = _operation(
    "gated_norm",
    lambda form, y, g, gain, _: torch_backend.gated_norm(y, gain, g, form.eps),
    lambda form, y, g, gain, _: torch_backend.gated_norm_reference(y, gain, g, form.eps),
)
_SWIGLU = Operation(
    "swiglu",
    [
        Backend("native", _swiglu_native, library.refuse, opaque=True),
        Backend("triton", _swiglu_triton, triton_runtime.refuse),
        Backend("torch", torch_backend.swiglu),
        Backend("reference", torch_backend.swiglu_reference),
    ],
    lambda x: x[..., : x.shape[-1] // 2],
)
