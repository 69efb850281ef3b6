"""A linear map: of a few tokens as fast as its weights can be read, of many as fast as a CPU can multiply.

Backends for few: ``native`` reads the weights once with the C kernel; ``torch`` has them read by the faster of
PyTorch's matrix products. For many: ``torch`` is PyTorch's own product; ``bfloat16``, the C kernel's, runs where
``native.operands`` allows it; ``native``, the same kernel's with operands as they are, multiplies large matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, plain, prepares, threads_worth, tracks
from ..cpu_runtime.operands import operands, refuse_narrow
from ..dispatch import Backend, Operation
from . import cpu as product

FEW = 4
"""Tokens up to which reading the weights is all that counts."""
LARGE = 128
"""Tokens, and numbers of each, from which on the C kernel packs what it multiplies in less time than that saves."""
REGISTER = 16
"""Inputs are read in registers of at most this many numbers: what is no multiple of it is left to PyTorch."""


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``x @ weight.T + bias``: ``x`` ``[..., in]``, ``weight`` ``[out, in]``, ``bias`` ``[out]`` or ``None``.

    ``backend``: of the operation ``projection``, or where there are more tokens than a few, of ``linear``.
    """
    width = weight.shape[1]
    tokens = x.numel() // width if width else 0
    if (
        tokens > FEW
        or tokens == 0
        or width % REGISTER
        or x.shape[-1] != width
        or not x.is_cpu
        or x.dtype != weight.dtype
        or (bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]))
        or tracks(x, weight, bias)
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not plain(x, weight, bias)
    ):
        return _linear_for(x, weight, bias, backend)(x, weight, bias)
    return _operation.choose(backend, device="cpu", dtype=x.dtype, tokens=tokens)(x, weight, bias)


def prepare_projection(weight: Tensor, y: Tensor) -> Callable[[Tensor], Tensor] | None:
    """``project`` for many times a few tokens, or ``None`` where that gains nothing.

    Returns a function of ``x`` ``[..., in]`` that writes into ``y`` ``[..., out]``, and gives ``y``. Without
    gradients, and for as long as the weight stays where it is.
    """
    out, width = weight.shape
    tokens = y.numel() // out
    if not (
        0 < tokens <= FEW
        and weight.is_cpu
        and not width % REGISTER
        and prepares(weight, y)
        and _operation.choose("auto", device="cpu", dtype=weight.dtype, tokens=tokens) is _native
    ):
        return None
    call = _KERNEL.prepared(weight.dtype, 4, 1, threads_for(weight), tokens, out, width, 0, weight, None, y)

    def run(x: Tensor) -> Tensor:
        x = x.contiguous()
        call(x.data_ptr())
        return y

    return run


def project_made(make: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> Tensor:
    """``make(*inputs) @ weight.T``, where backward makes the projection's input again: it is cheap and large.

    ``make`` is differentiable, and draws no random numbers.
    """
    if not tracks(weight, *inputs) or torch.compiler.is_compiling():  # which decides what to keep
        made = make(*inputs)
        return _linear_for(made, weight)(made, weight)
    y: Tensor = _Made.apply(make, weight, *inputs)
    return y


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(weight, *inputs)
        made = make(*inputs)
        ctx.linear = _linear_for(made, weight)
        return ctx.linear(made, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        given = [x.detach().requires_grad_(need) for x, need in zip(inputs, ctx.needs_input_grad[2:])]
        with torch.enable_grad():
            made = ctx.make(*given)
        # under autocast the product was narrow, and so are the products of its gradient
        grad_weight = None
        if ctx.needs_input_grad[1]:
            rows = made.detach().to(grad.dtype).flatten(0, -2)
            grad_weight = ctx.linear(grad.flatten(0, -2).mT, rows.mT).to(weight.dtype)
        wanted = [x for x in given if x.requires_grad]
        if not wanted:
            return None, grad_weight, *[None] * len(given)
        grads = iter(torch.autograd.grad(made, wanted, ctx.linear(grad, weight.to(grad.dtype).mT).to(made.dtype)))
        return None, grad_weight, *[next(grads) if x.requires_grad else None for x in given]


def _linear_for(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Callable[..., Tensor]:
    """What runs the linear map of many tokens: ``F.linear`` unasked, where anything is out of the ordinary."""
    unusual = (
        not x.is_cpu
        or x.numel() <= FEW * x.shape[-1]
        or not weight.numel()
        or x.shape[-1] != weight.shape[1]
        or any(t is not None and t.dtype != x.dtype for t in (weight, bias))
        or (bias is not None and bias.shape != weight.shape[:1])
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not plain(x, weight, bias)
    )
    products = None if unusual else operands(x.dtype)
    large = not unusual and min(x.numel() // x.shape[-1], *weight.shape) >= LARGE
    return _linear.choose(backend, device=x.device.type, dtype=x.dtype, operands=products, unusual=unusual, large=large)


def _refuse_native(*, dtype: torch.dtype, large: bool = False, **facts: Any) -> str | None:
    if dtype != torch.float32:
        return f"is for float32 numbers, not for {dtype}"
    if not large:
        return f"is for ordinary CPU tensors of at least {LARGE} tokens and as many numbers of each, before and after"
    return library.refuse(dtype=dtype, **facts)


def _refuse_bfloat16(*, dtype: torch.dtype, unusual: bool = False, **facts: Any) -> str | None:
    if unusual:
        return "takes more than a few tokens, in ordinary CPU tensors of one dtype, outside of autocast and compilers"
    if dtype != torch.float32:
        return f"is for float32 numbers, not for {dtype}"
    return library.refuse(dtype=dtype, **facts) or refuse_narrow()


def threads_for(*weights: Tensor | None) -> int:
    """How many threads are worth waking up to read these."""
    return threads_worth(sum([w.nbytes for w in weights if w is not None]))


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out, width = weight.shape
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype)
    _KERNEL(
        x.dtype, threads_for(weight), x.numel() // width, out, width,
        x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr(),
    )  # fmt: skip
    return y


def _halves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The CPU's matrix-vector product reads weights that are not in a cache at half the speed at which its batched
    product does. With a token or two, the weights are therefore a batch of two halves, and tokens are columns.
    """
    out, width = weight.shape
    tokens = x.numel() // width
    if tokens > 2 or out % 2 or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    columns = x.contiguous().as_strided((2, width, tokens), (0, 1, width))
    y = torch.bmm(weight.view(2, out // 2, width), columns)
    if tokens > 1:
        y = y.view(out, tokens).t()
    y = y.reshape(*x.shape[:-1], out)
    return y if bias is None else y.add_(bias)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return y if bias is None else y + bias


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x @ weight.mT
    return y if bias is None else y + bias


_KERNEL = Kernel("project", 8, 0)

_operation = Operation(
    "projection",
    [Backend("native", _native, library.refuse), Backend("torch", _halves), Backend("reference", _reference)],
)

_linear = Operation(
    "linear",
    [
        Backend("bfloat16", product.linear, _refuse_bfloat16),
        Backend("native", functools.partial(product.linear, operands=torch.float32), _refuse_native),
        Backend("torch", F.linear),
        Backend("reference", _linear_reference),
    ],
)
