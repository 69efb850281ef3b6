"""Linear maps ``x @ weight.T + bias``.

Two operations: ``projection`` for up to ``DECODE_TOKENS`` tokens, where time goes into reading the weights, and
``linear`` for more. Backends of ``projection``: ``native`` is a C kernel, ``torch`` the faster of PyTorch's products.
Of ``linear``: ``bfloat16`` is the C kernel with bfloat16 operands, where ``product_dtype`` allows them, ``native`` the
same kernel with operands as they are, for large matrices, and ``torch`` is ``F.linear``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autograd import differentiable
from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, product_dtype, refuse_bfloat16, threads_for
from ..dispatch import (
    DECODE_TOKENS,
    Backend,
    Operation,
    can_prepare,
    is_plain_cpu_tensor,
    needs_grad,
    transforming,
    use_decode_kernel,
)
from . import cpu

LARGE = 128
"""Tokens, inputs and outputs from which on packing the operands pays."""


# Hooks and compilation in place have no public functions that ask for them. Of the private names of nn.Module, all that
# this package uses are in the next two functions.


def is_unmodified(module: nn.Module, *methods: str) -> bool:
    """Whether calling ``module`` runs ``methods`` of its class and nothing else.

    False with hooks, after ``module.compile()``, and if the instance has its own version of one of ``methods``, such as
    the ``forward`` that accelerate sets.
    """
    for method in methods:
        if method in vars(module):
            return False
    everywhere: Any = torch.nn.modules.module
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def module_tables(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """The dictionaries in which ``module`` has its children, parameters, and hooks of ``forward``."""
    return module._modules, module._parameters, module._forward_hooks, module._forward_pre_hooks


class SmallLinear(nn.Linear):
    """``nn.Linear`` of few outputs, such as gates. bitsandbytes does not quantize it: its kernels take 32 outputs."""


def is_plain(*layers: nn.Module) -> bool:
    """Whether calling each layer is the product with its weights, so that a block may read them and not call it.

    True for a linear layer as it was made. False if it was replaced or parametrized (LoRA, quantization), has hooks
    (pruning) or a ``forward`` of its own (offloading), or if its weights are no ordinary tensors (DTensor, torchao).
    """
    for layer in layers:
        if type(layer) not in _LINEAR or not is_unmodified(layer, "forward") or type(layer.weight) not in _ORDINARY:
            return False
    return True


_LINEAR = (nn.Linear, SmallLinear)
_ORDINARY = (nn.Parameter, Tensor)


def fuses(x: Tensor, *layers: nn.Module) -> bool:
    """Whether one kernel may replace ``layers`` and the functions between them: plain layers, few tokens, no grad."""
    if torch.is_grad_enabled() or x.numel() > DECODE_TOKENS * x.shape[-1] or not is_plain(*layers):
        return False
    weights: Any = [layer.weight for layer in layers]
    return use_decode_kernel(x, *weights)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, by ``project`` if the layer is plain."""
    if is_plain(layer):
        return project(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    y: Tensor = layer(x)
    return y


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``x @ weight.T + bias``: ``x`` ``[..., in]``, ``weight`` ``[out, in]``, ``bias`` ``[out]`` or ``None``.

    ``backend``: of the operation ``projection`` for a few tokens without gradients, else of ``linear``.
    """
    width = x.shape[-1]
    few = x.numel() <= DECODE_TOKENS * width and use_decode_kernel(x, weight, all_tensors=True)
    if few and width == weight.shape[-1] and (bias is None or _fits(bias, x, weight)):
        tokens = x.numel() // width
        return _projection.choose(backend, device="cpu", dtype=x.dtype, tokens=tokens)(x, weight, bias)
    return _choose_linear(x, weight, bias, backend)(x, weight, bias)


def _fits(bias: Tensor, x: Tensor, weight: Tensor) -> bool:
    fits = bias.dtype == x.dtype and bias.shape == weight.shape[:1]
    return fits and not needs_grad(bias) and is_plain_cpu_tensor(bias)


def linear_of(layer: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``layer(function(*inputs))``; backward computes ``function(*inputs)`` again instead of keeping it.

    ``function`` is differentiable, cheap, and draws no random numbers. ``layer`` has no bias.
    """
    if not is_plain(layer):
        y: Tensor = layer(function(*inputs))
        return y
    weight: Any = layer.weight
    # a compiler decides itself what to keep
    if needs_grad(weight, *inputs) and not torch.compiler.is_compiling():
        try:
            y = _Recomputed.apply(function, weight, *inputs)
            return y
        except RuntimeError:  # torch.func and forward mode do not take it
            if not transforming():
                raise
    made = function(*inputs)
    return _choose_linear(made, weight)(made, weight)


def _formula(ctx: Any, weight: Tensor, *inputs: Tensor) -> Tensor:
    return F.linear(ctx.make(*inputs), weight)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(weight, *inputs)
        made = make(*inputs)
        ctx.linear = _choose_linear(made, weight)
        return ctx.linear(made, weight)

    @staticmethod
    @differentiable(_formula, first=1)
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


def prepare_projection(weight: Tensor, y: Tensor) -> Callable[[Tensor], Tensor] | None:
    """:func:`project` prepared for many calls of a few tokens, or ``None`` where the C kernel does not run.

    Returns a function of ``x`` ``[..., in]`` that writes into ``y`` ``[..., out]`` and returns it, without gradients.
    The weight must stay where it is.
    """
    out, width = weight.shape
    tokens = y.numel() // out
    if not (
        can_prepare(weight, y)
        and use_decode_kernel(weight.new_empty(tokens, width), weight)
        and _projection.choose("auto", device="cpu", dtype=weight.dtype, tokens=tokens) is _native
    ):
        return None
    call = _KERNEL.prepare(
        weight.dtype, 4, 1, threads_for(weight.nbytes), tokens, out, width, 0, weight, None, y
    )  # fmt: skip

    def run(x: Tensor) -> Tensor:
        x = x.contiguous()
        call(x.data_ptr())
        return y

    return run


# -- backends of projection --------------------------------------------------------------------------------------------

_KERNEL = Kernel("project", integers=8)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out, width = weight.shape
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype)
    _KERNEL(
        x.dtype, threads_for(weight.nbytes), x.numel() // width, out, width,
        x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr(),
    )  # fmt: skip
    return y


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Two halves of the weight as a batch, for one or two tokens.

    The CPU's matrix-vector product reads weights from main memory at half the speed of its batched product.
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


_projection = Operation(
    "projection",
    [Backend("native", _native, library.refuse), Backend("torch", _torch), Backend("reference", _reference)],
)

# -- backends of linear ------------------------------------------------------------------------------------------------


def _choose_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto"
) -> Callable[..., Tensor]:
    products, large, width = None, False, x.shape[-1]
    usual = (
        x.is_cpu
        and x.numel() > DECODE_TOKENS * width
        and weight.numel() > 0
        and width == weight.shape[1]
        and weight.dtype == x.dtype
        and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and is_plain_cpu_tensor(x, weight, bias)
    )
    if usual:
        products, large = product_dtype(x.dtype), min(x.numel() // width, *weight.shape) >= LARGE
    return _linear.choose(backend, device=x.device.type, dtype=x.dtype, operands=products, usual=usual, large=large)


def _refuse_native(*, dtype: torch.dtype, large: bool = False, **facts: Any) -> str | None:
    if dtype != torch.float32:
        return f"is for float32 numbers, not for {dtype}"
    if not large:
        return f"is for ordinary CPU tensors of at least {LARGE} tokens and as many numbers of each, before and after"
    return library.refuse(dtype=dtype, **facts)


def _refuse_bfloat16(*, dtype: torch.dtype, usual: bool = True, **facts: Any) -> str | None:
    if not usual:
        return "takes more than a few tokens, in ordinary CPU tensors of one dtype, outside of autocast and compilers"
    if dtype != torch.float32:
        return f"is for float32 numbers, not for {dtype}"
    return library.refuse(dtype=dtype, **facts) or refuse_bfloat16()


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x @ weight.mT
    return y if bias is None else y + bias


_linear = Operation(
    "linear",
    [
        Backend("bfloat16", cpu.linear, _refuse_bfloat16),
        Backend("native", functools.partial(cpu.linear, operands=torch.float32), _refuse_native),
        Backend("torch", F.linear),
        Backend("reference", _linear_reference),
    ],
)
