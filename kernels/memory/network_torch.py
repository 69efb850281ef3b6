"""The memory network at fixed weights in PyTorch: its activations, its LayerNorm, its error, and reading."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import gradient_of
from ..dispatch import full_precision, needs_grad, transforming
from .state import Objective

EPS = 1e-6
_aten = torch.ops.aten


# -- activations -------------------------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """An elementwise function with the two derivatives that training through a memory needs."""

    value: Callable[..., Tensor]
    """``(z, out=None) -> value(z)``."""
    vjp: Callable[..., Tensor]
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


def _either(allocating: Callable[..., Tensor], writing: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One function of the two forms of an operator: allocating, and writing into ``out``."""

    def call(*tensors: Tensor, out: Tensor | None = None) -> Tensor:
        return allocating(*tensors) if out is None else writing(*tensors, out)

    return call


ACTIVATIONS = {
    "identity": Activation(
        _either(lambda z: z, lambda z, out: out.copy_(z)), _either(lambda g, z: g, lambda g, z, out: out.copy_(g)), None
    ),
    "relu": Activation(
        _either(torch.relu, lambda z, out: _aten.relu.out(z, out=out)),
        _either(
            lambda g, z: _aten.threshold_backward(g, z, 0),
            lambda g, z, out: _aten.threshold_backward.grad_input(g, z, 0, grad_input=out),
        ),
        None,
    ),
    "silu": Activation(
        _either(_aten.silu, lambda z, out: _aten.silu.out(z, out=out)),
        _either(_aten.silu_backward, lambda g, z, out: _aten.silu_backward.grad_input(g, z, grad_input=out)),
        _silu_second,
    ),
    "gelu": Activation(
        _either(F.gelu, lambda z, out: _aten.gelu.out(z, out=out)),
        _either(_aten.gelu_backward, lambda g, z, out: _aten.gelu_backward.grad_input(g, z, grad_input=out)),
        _gelu_second,
    ),
}


def gated(name: str) -> Activation:
    """``act(z_1) z_2`` of both products of a gated network side by side: ``[..., 2 h] -> [..., h]``.

    ``vjp`` takes ``[..., h]`` and gives ``[..., 2 h]``. ``second`` gives the derivative of ``act(z_1) z_2`` twice with
    respect to ``z_1``, and beside it that with respect to both.
    """
    act = ACTIVATIONS[name]

    def value(z: Tensor, out: Tensor | None = None) -> Tensor:
        first, gate = z.chunk(2, -1)
        return torch.mul(act.value(first), gate, out=out)

    def vjp(g: Tensor, z: Tensor, out: Tensor | None = None) -> Tensor:
        first, gate = z.chunk(2, -1)
        return torch.cat([act.vjp(g * gate, first), g * act.value(first)], -1, out=out)

    def second(z: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
        first, gate = (x.contiguous() for x in z.chunk(2, -1))
        own, across = torch.zeros_like(first), act.vjp(torch.ones_like(first), first)
        if act.second is not None:
            own = act.second(first, own, torch.empty_like(first)).mul_(gate)
        return torch.cat([own, across], -1, out=out)

    return Activation(value, vjp, second)


ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
"""As ``enum activation`` of the C kernels and the Triton kernels number them."""


READ_NUMBERS = {"before": 0, "after": 1, "anchor": 2}
"""As ``enum reading`` of the C kernels and the Triton kernels number what ``Options.read`` names."""
LOSSES = ("l2", "l2_half", "dot", "lp", "lp_smooth", "huber", "huber_elementwise")
"""As ``enum loss`` of the C kernels and the Triton kernels number the forms of objectives."""
LOSS_NUMBERS = {
    (kind, smooth, form): LOSSES.index(
        "lp_smooth" if kind == "lp" and smooth else
        "huber_elementwise" if kind == "huber" and form == "elementwise" else kind
    )
    for kind in ("l2", "l2_half", "dot", "lp", "huber") for smooth in (False, True) for form in ("norm", "elementwise")
}  # fmt: skip
"""By an objective's kind, whether it is smooth, and its form."""


# -- LayerNorm and norms -----------------------------------------------------------------------------------------------


def layer_norm_vjp(g: Tensor, n: Tensor, inverse: Tensor) -> Tensor:
    """The vector-Jacobian product of ``z -> n = (z - mean) / sigma``; ``inverse`` is ``1 / sigma``.

    The fused backward is given ``n`` itself, of mean 0 and deviation 1: from ``z`` it would lose digits by
    cancellation where sigma is small.
    """
    mask, zero, one = [True, False, False], torch.zeros_like(inverse), torch.ones_like(inverse)
    return _aten.native_layer_norm_backward(g, n, n.shape[-1:], zero, one, None, None, mask)[0].mul_(inverse)


def length(x: Tensor) -> Tensor:
    """``[..., d] -> [...]``, float64: each vector's length, where the squares of its numbers overflow, too."""
    if x.dtype == torch.float32:
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    unit = torch.linalg.vector_norm(x, math.inf, -1, True).clamp_(min=1)
    return torch.linalg.vector_norm(x / unit, dim=-1) * unit.squeeze(-1)


def gradient_norm(errors: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """The norm of each token's gradient ``2 d a^T`` in all layers together, in the dtype of the errors."""
    total, *others = [length(d).mul_(length(a)) for d, a in zip(errors, inputs)]
    for other in others:
        total.hypot_(other)
    return total.mul_(2).to(errors[0].dtype)


# -- the error ---------------------------------------------------------------------------------------------------------


def half_error(
    p: Tensor, v: Tensor, objective: Objective, delta: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Half the objective's derivative with respect to the prediction ``p``, of tokens ``[..., d_out]``.

    ``delta``: ``[..., 1]``, in place of the objective's. Differentiable without ``out``, which may be ``p``. Where a
    power of 0 has no derivative, that of the error is 0.
    """
    kind, power, fixed, smooth, form = objective
    if kind == "l2":
        return torch.sub(p, v, out=out)
    if kind == "dot":
        return torch.mul(v, -0.5, out=out)
    r = p - v
    if kind == "l2_half":
        error = r / 2
    elif kind == "huber" and form == "elementwise":
        limit = r.new_tensor(fixed) if delta is None else delta
        error = torch.where(r.abs() > limit, limit * _sign(r), r) / 2
    elif kind == "huber":
        delta = r.new_tensor(fixed) if delta is None else delta
        error = torch.where(_within(r, delta), r, delta / 2 * _sign(r))
    elif kind == "lp":
        error = power / 2 * (_sign(r) if smooth is None else (smooth * r).tanh())
        error = error * _magnitude(r, power - 1)
    else:
        raise ValueError(f"objective: expected l2, l2_half, dot, lp or huber, got {kind!r}")
    return error if out is None else out.copy_(error)


def half_error_vjp(
    g: Tensor, p: Tensor, v: Tensor, objective: Objective, delta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of ``p`` and ``v`` from that of ``half_error(p, v, objective, delta)``."""
    kind, power, fixed, smooth, form = objective
    limit = fixed if delta is None else delta
    if kind == "l2":
        return g, -g
    if kind == "dot":
        return torch.zeros_like(g), g / -2
    r = p - v
    if kind == "l2_half":
        grad = g / 2
    elif kind == "huber" and form == "elementwise":
        grad = torch.where(r.abs() <= limit, g / 2, 0.0)
    elif kind == "huber":
        grad = torch.where(_within(r, limit), g, 0.0)
    elif smooth is None:
        grad = g * (power * (power - 1) / 2) * _magnitude(r, power - 2)
    else:
        sign = (smooth * r).tanh()
        slope = (1 - sign * sign) * smooth * _magnitude(r, power - 1)
        if power != 1:
            slope = slope + (power - 1) * sign.abs() * _magnitude(r, power - 2)
        grad = g * power / 2 * slope
    return grad, -grad


def delta_vjp(g: Tensor, p: Tensor, v: Tensor, objective: Objective, delta: Tensor) -> Tensor:
    """The gradient of ``delta`` ``[..., 1]`` from that of ``half_error(p, v, objective, delta)``."""
    r = p - v
    within = r.abs() <= delta if objective.form == "elementwise" else _within(r, delta)
    return torch.where(within, 0.0, g * _sign(r)).sum(-1, keepdim=True) / 2


def _sign(r: Tensor) -> Tensor:
    return torch.where(r.isnan(), r, r.sign())


def _within(r: Tensor, delta: Tensor | float) -> Tensor:
    return torch.linalg.vector_norm(r, dim=-1, keepdim=True) <= delta


def _magnitude(r: Tensor, power: float) -> Tensor:
    """``|r|^power``; 0 at 0 unless the power is 0."""
    if power == 0:
        return torch.ones_like(r)
    zero = r == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, r).abs() ** power)


# -- reading -----------------------------------------------------------------------------------------------------------


def torch_read(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None) -> Tensor:
    """``read_memory`` on any device."""
    batch, time, heads, _ = q.shape
    transformed = transforming()
    # a compiler decides itself what to keep
    if needs_grad(q, norm, *weights) and not torch.compiler.is_compiling() and not transformed:
        return _Recomputed.apply(activation, q, norm, *weights)
    if time > 1 or transformed:
        return _network(q, weights, activation, norm)
    gain = None if norm is None else repeat_gain(norm, batch)
    y = read_one(q.reshape(batch * heads, 1, -1), [w.flatten(0, 1) for w in weights], activation, gain)
    return y.view(batch, 1, heads, -1)


def _network(q: Tensor, weights: Sequence[Tensor], activation: str, norm: Tensor | None) -> Tensor:
    gain = None if norm is None else norm.unsqueeze(1)
    return memory_network(q.transpose(1, 2), weights, ACTIVATIONS[activation], gain).transpose(1, 2)


def memory_network(
    x: Tensor, weights: Sequence[Tensor], activation: Activation, gain: Tensor | None,
    matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:  # fmt: skip
    """``M(x)``: x ``[..., tokens, d_in]``, weights ``[..., out, in]``, a gain ``[..., 1, d_out]``."""
    h = x
    for layer, weight in enumerate(weights):
        h = matmul(activation.value(h) if layer else h, weight.mT)
    return h if gain is None else x + F.layer_norm(h, h.shape[-1:], eps=EPS) * gain


def read_formula(ctx: Any, q: Tensor, norm: Tensor | None, *weights: Tensor) -> Tensor:
    """What the functions of autograd for reading compute, in differentiable operators."""
    with full_precision(q.device.type):
        return _network(q.to(weights[0].dtype), weights, ctx.activation, norm).to(q.dtype)


class _Recomputed(torch.autograd.Function):
    """Keeps the queries and the weights, which exist anyway, and no hidden value."""

    @staticmethod
    def forward(ctx: Any, activation: str, q: Tensor, norm: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(q, norm, *weights)
        ctx.activation = activation
        return _network(q, weights, activation, norm)

    backward = staticmethod(gradient_of(read_formula, first=1))


# -- one token per row, without gradients: every tensor is [batch * heads, 1, width] -----------------------------------


def read_one(query: Tensor, weights: list[Tensor], activation: str, gain: Tensor | None) -> Tensor:
    """``M(query)``: query ``[batch * heads, 1, d_in]``, weights ``[batch * heads, out, in]``."""
    y = layers_one(query, weights, activation)[1][-1]
    if gain is None:
        return y
    return torch.addcmul(query, torch.native_layer_norm(y, y.shape[-1:], None, None, EPS)[0], gain)


def layers_one(x: Tensor, weights: list[Tensor], activation: str) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' inputs and outputs for the network's input ``x``."""
    value = for_few(ACTIVATIONS[activation].value)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for weight in weights:
        inputs.append(x if not inputs else outputs[-1] if activation == "identity" else value(outputs[-1]))
        # the transpose's strides matter: the same column as a contiguous tensor takes seven times as long
        outputs.append(torch.bmm(weight, inputs[-1].mT).view(x.shape[0], 1, -1))
    return inputs, outputs


def for_few(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An elementwise function of ``[batch * heads, x, y]``, made fast for few numbers.

    PyTorch hands contiguous tensors to a library that takes longer to set up than these take to compute.
    """
    return lambda *tensors: function(*[x.transpose(0, 2) for x in tensors]).transpose(0, 2)


def repeat_gain(gain: Tensor, batch: int) -> Tensor:
    """``[heads, d] -> [batch * heads, 1, d]``."""
    return gain.expand(batch, *gain.shape).reshape(-1, 1, gain.shape[-1])
