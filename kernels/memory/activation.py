"""The activations a memory network may use, with the two derivatives that training through it needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class Activation(NamedTuple):
    """A function of each number of ``z``, with its first two derivatives; all take and give tensors of one shape."""

    value: Callable[..., Tensor]
    """``(z, out=None) -> value(z)``."""
    pull: Callable[..., Tensor]
    """``(g, z, out=None) -> g * value'(z)``: one fused pass."""
    second: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    """``(z, out, scratch) -> value''(z)`` in ``out``; ``None`` where it is zero everywhere."""


def _silu_second(z: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    # s' (2 + z (1 - 2 s)) with s the logistic function and s' = s (1 - s)
    s = torch.sigmoid(z, out=scratch)
    torch.addcmul(s, s, s, value=-1, out=out)
    return out.mul_(s.mul_(-2).add_(1).mul_(z).add_(2))


def _gelu_second(z: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    # value = z Phi(z), so value'' = phi(z) (2 - z^2) with phi the normal density
    square = torch.mul(z, z, out=scratch)
    torch.mul(square, -0.5, out=out).exp_()
    scale = 1 / math.sqrt(2 * math.pi)
    return out.mul_(square.mul_(-scale).add_(2 * scale))


def _into(plain: Callable[..., Tensor], written: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One function of the two an operator comes as: allocating, and writing into ``out``."""

    def call(*tensors: Tensor, out: Tensor | None = None) -> Tensor:
        return plain(*tensors) if out is None else written(*tensors, out)

    return call


NUMBERS = {"identity": 0, "relu": 1, "silu": 2, "gelu": 3}
"""As ``enum activation`` of the C kernels numbers them."""

ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(
        _into(lambda z: z, lambda z, out: out.copy_(z)), _into(lambda g, z: g, lambda g, z, out: out.copy_(g)), None
    ),
    "relu": Activation(
        _into(torch.relu, lambda z, out: _aten.relu.out(z, out=out)),
        _into(
            lambda g, z: _aten.threshold_backward(g, z, 0),
            lambda g, z, out: _aten.threshold_backward.grad_input(g, z, 0, grad_input=out),
        ),
        None,
    ),
    "silu": Activation(
        _into(_aten.silu, lambda z, out: _aten.silu.out(z, out=out)),
        _into(_aten.silu_backward, lambda g, z, out: _aten.silu_backward.grad_input(g, z, grad_input=out)),
        _silu_second,
    ),
    "gelu": Activation(
        _into(torch.nn.functional.gelu, lambda z, out: _aten.gelu.out(z, out=out)),
        _into(_aten.gelu_backward, lambda g, z, out: _aten.gelu_backward.grad_input(g, z, grad_input=out)),
        _gelu_second,
    ),
}
