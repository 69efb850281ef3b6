"""The linear recurrence ``x_t = a_t x_{t-1} + b_t`` over time, by a parallel associative scan (paper 3.2).

With ``a`` the momentum's decay and ``b`` the steps ``-theta grad`` it is the momentum of a chunk, for all tokens at
once; with ``a = 1 - alpha`` and ``b`` the momentum it is the weights. Gates are multiplied and never divided by, and
no logarithm is taken: one that is exactly 0 or 1 is exact, and so is the gradient at it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, Operation, expect_tensors, transforming


def linear_scan(gates: Tensor, inputs: Tensor, start: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``x_1 .. x_T`` ``[batch, time, ...]`` from ``inputs`` ``b`` of that shape and the state before the first.

    ``gates`` ``a``: of the shape of ``inputs``, or with sizes 1 to be expanded. ``start`` ``[batch, ...]``: zeros if
    not given. All of one floating-point dtype. Differentiable in all three. Raises ``ValueError`` for shapes or
    devices that do not fit, ``TypeError`` for other dtypes.
    """
    given = (("inputs", inputs), ("gates", gates), ("start", start))
    expect_tensors("linear_scan", *given[: 2 if start is None else 3])
    if inputs.dim() < 2 or gates.dim() != inputs.dim():
        raise ValueError(f"gates {list(gates.shape)}, inputs {list(inputs.shape)}: expected both [batch, time, ...]")
    try:
        gates = gates.expand_as(inputs)
    except RuntimeError:
        raise ValueError(f"gates {list(gates.shape)}: expected sizes of inputs {list(inputs.shape)}, or 1") from None
    if start is not None and start.shape != inputs[:, 0:0].sum(1).shape:
        raise ValueError(f"start {list(start.shape)}: expected {[inputs.shape[0], *inputs.shape[2:]]} as inputs")
    if start is not None:
        first = inputs[:, :1] + gates[:, :1] * start.unsqueeze(1)
        inputs = torch.cat([first, inputs[:, 1:]], dim=1)
    return LINEAR_SCAN.choose(backend, device=inputs.device.type, dtype=inputs.dtype)(gates, inputs)


class _Doubling(torch.autograd.Function):
    """``log2(time)`` rounds, each of which joins every stretch with the one before it: ``(a, b) o (a', b')``."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, inputs: Tensor) -> Tensor:
        x = _doubled(gates, inputs)
        ctx.save_for_backward(gates, x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gates, x = ctx.saved_tensors
        # what reaches x_t is its own gradient and what x_{t+1} passes back: the same recurrence from the other end
        later = torch.cat([gates[:, 1:], torch.zeros_like(gates[:, :1])], dim=1)
        passed = _doubled(later.flip(1), grad.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return passed * before, passed


def _doubled(gates: Tensor, inputs: Tensor) -> Tensor:
    a, b, reach = gates, inputs, 1
    while reach < inputs.shape[1]:
        b = torch.cat([b[:, :reach], torch.addcmul(b[:, reach:], a[:, reach:], b[:, :-reach])], dim=1)
        a = torch.cat([a[:, :reach], a[:, reach:] * a[:, :-reach]], dim=1)
        reach *= 2
    return b


def _scan(gates: Tensor, inputs: Tensor) -> Tensor:
    x: Tensor = (_doubled if transforming() else _Doubling.apply)(gates, inputs)
    return x


def _reference(gates: Tensor, inputs: Tensor) -> Tensor:
    x: list[Tensor] = []
    for t in range(inputs.shape[1]):
        x.append(gates[:, t] * x[-1] + inputs[:, t] if x else inputs[:, t])
    return torch.stack(x, dim=1) if x else gates * inputs


LINEAR_SCAN = Operation("linear_scan", [Backend("doubling", _scan), Backend("reference", _reference)])
