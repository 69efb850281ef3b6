"""The layers inside blocks: linear maps, norms and gating. ``rms_norm`` and ``layer_norm`` are blocks themselves.

Kernels that fuse several layers run only where each layer is exactly the one that a block created.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.dispatch import use_decode_kernel
from ..kernels.linear import project, project_recomputed
from ..kernels.norm_gate import decode, gate, gated_norm, rms_norm, swiglu
from ..registry import register
from .block import Block
from .state import State

Eps = Annotated[float, Field(gt=0, description="added to the mean square (or the variance) for numerical stability")]
Form = Literal["sigmoid", "silu", "sum"]


class Linear(nn.Linear):
    """``nn.Linear`` with a faster product for few tokens. It is initialized by the block that contains it."""

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs hooks or compiled code, and not only its ``forward``."""
    everywhere: Any = torch.nn.modules.module
    return bool(
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


def is_plain(*layers: nn.Module) -> bool:
    """Whether each layer is an unmodified :class:`Linear`: not replaced, not parametrised and without hooks."""
    for layer in layers:
        if type(layer) is not Linear:
            return False
        if has_hooks(layer):
            return False
    return True


def fuses(x: Tensor, *layers: nn.Module) -> bool:
    """Whether one kernel may replace ``layers`` and the functions between them: plain layers, few tokens, no grad."""
    if torch.is_grad_enabled() or not is_plain(*layers):
        return False
    weights: Any = [layer.weight for layer in layers]
    return use_decode_kernel(x, *weights)


def linear_of(layer: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``layer(function(*inputs))``. Backward recomputes the input of the layer, which is large and cheap."""
    if is_plain(layer):
        return project_recomputed(function, layer.weight, *inputs)  # type: ignore[arg-type]
    y: Tensor = layer(function(*inputs))
    return y


def gated_output(y: Tensor, gain: Tensor, x: Tensor, gate: nn.Module, out: nn.Module) -> Tensor:
    """``out(rms_norm(y) * gain * silu(gate(x)))``.

    ``y``: ``[batch, time, heads, d]``, normalized per head; ``gain``: ``[heads, d]``; ``x``: ``[batch, time, dim]``.
    """
    if fuses(x, gate, out):
        return decode.gated_output(y, gain, x, gate.weight, out.weight)  # type: ignore[arg-type]
    return linear_of(out, gated_norm, y, gain, gate(x))


def feed_forward(x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
    """SwiGLU, ``down(silu(a) * b)`` with ``a, b = up(x).chunk(2, -1)``."""
    if fuses(x, up, down):
        return decode.feed_forward(x, up.weight, down.weight)  # type: ignore[arg-type]
    return linear_of(down, swiglu, up(x))


class Norm(Block):
    """Normalization of each token's features, with a learned gain. Stateless."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim)
        self.eps = eps
        self.gain = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)


@register("rms_norm")
class RMSNorm(Norm):
    """Root mean square normalization, ``x / rms(x) * gain``."""

    def __init__(self, dim: int, *, eps: Eps = 1e-6) -> None:
        super().__init__(dim, eps)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        y = rms_norm(x, self.gain, self.eps)
        return y if mask is None else torch.where(mask[..., None], y, 0.0), state


@register("layer_norm")
class LayerNorm(Norm):
    """Layer normalization without a bias, ``(x - mean(x)) / std(x) * gain``."""

    def __init__(self, dim: int, *, eps: Eps = 1e-6) -> None:
        super().__init__(dim, eps)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        y = F.layer_norm(x, (self.dim,), self.gain, None, self.eps)
        return y if mask is None else torch.where(mask[..., None], y, 0.0), state


class Gating(nn.Module):
    """``gate(a, b) = norm(a) * sigmoid(norm(b))``, with RMS norms that have learned gains (paper 4.2).

    The form ``silu`` is ``norm(a) * silu(norm(b))``, and ``sum`` is ``norm(a) + norm(b)``. Zero inputs give zero
    outputs in every form, so outputs at masked tokens are zero.
    """

    eps = 1e-6

    def __init__(self, dim: int, form: Form = "sigmoid") -> None:
        super().__init__()
        self.form = form
        self.gain_a = nn.Parameter(torch.empty(dim))
        self.gain_b = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain_a)
        nn.init.ones_(self.gain_b)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``a``, ``b``, output: ``[..., dim]``."""
        if self.form == "sigmoid":
            return gate(a, b, self.gain_a, self.gain_b, self.eps)
        a, b = rms_norm(a, self.gain_a, self.eps), rms_norm(b, self.gain_b, self.eps)
        return a * F.silu(b) if self.form == "silu" else a + b

    def opening(self, b: Tensor) -> Tensor:
        """Return the factor of ``norm(a)`` for ``b``, both ``[..., dim]``. 1 for the form ``sum``."""
        if self.form == "sum":
            return torch.ones_like(b)
        b = rms_norm(b, self.gain_b, self.eps)
        return F.silu(b) if self.form == "silu" else torch.sigmoid(b)
