"""The short causal convolution: each channel looks at its own last few inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import expect_tensors
from ..dispatch import Backend, Operation
from ..triton_runtime import availability as triton


def causal_convolution(x: Tensor, weight: Tensor, history: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``y[:, t, c] = sum_i weight[c, i] * input[:, t - width + 1 + i, c]``, where ``history`` comes before ``x``.

    ``x``: ``[batch, time, dim]``. ``weight``: ``[dim, width]``, its last column on the current token.
    ``history``: ``[batch, width - 1, dim]``, the inputs before ``x``; zeros if ``None``.
    Returns ``[batch, time, dim]``. Raises ``ValueError`` for shapes or devices that do not fit, ``TypeError`` for
    dtypes that are not one.
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
    """``causal_convolution`` of ``inputs`` ``[batch, width - 1 + time, dim]`` that begin with their history."""
    return _operation.choose(backend, device=inputs.device.type, dtype=inputs.dtype, same=weight.dtype == inputs.dtype)(
        inputs, weight
    )


def _reference(inputs: Tensor, weight: Tensor) -> Tensor:
    if inputs.shape[1] < weight.shape[1]:
        return inputs[:, :0]  # a history and no token, which conv1d refuses
    return F.conv1d(inputs.transpose(1, 2), weight[:, None], groups=weight.shape[0]).transpose(1, 2)


_TILE = 2**18
"""Numbers worked on at a time: a tile and what is made of it stay in a cache."""


def _shifted(inputs: Tensor, weight: Tensor) -> Tensor:
    """A sum of shifted products, which leaves time and channels where they are: no transposition."""
    if inputs.shape[1] == weight.shape[1]:
        return (inputs * weight.t()).sum(dim=1, keepdim=True)
    return _Shifted.apply(inputs, weight)


class _Shifted(torch.autograd.Function):
    """Tiles of time, so that neither direction streams the sequence through memory once per tap."""

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
    @torch.autograd.function.once_differentiable
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


def _tiles(y: Tensor) -> list[tuple[int, int]]:
    if torch.compiler.is_compiling():  # which tiles by itself, and counts no rounds of a length that is a symbol
        return [(0, y.shape[1])]
    size = max(1, _TILE // max(1, y.shape[0] * y.shape[2]))
    return [(start, min(start + size, y.shape[1])) for start in range(0, y.shape[1], size)]


def _triton(inputs: Tensor, weight: Tensor) -> Tensor:
    from .triton import convolve

    return convolve(inputs, weight)


_operation = Operation(
    "convolution",
    [Backend("triton", _triton, triton.refuse), Backend("torch", _shifted), Backend("reference", _reference)],
)
