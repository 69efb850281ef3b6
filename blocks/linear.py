"""Linear layers, alone and in the products that end a block; fused where a layer is exactly the one a block created."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import use_decode_kernel
from ..kernels.linear import project, project_recomputed
from ..kernels.norm_gate import decode, gated_norm, swiglu


class Linear(nn.Linear):
    """``nn.Linear``, fast for one token too. The block that holds it initialises it."""

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than its ``forward``: hooks, or code that was compiled."""
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
    """Whether calling each layer is ``project`` and nothing more: not replaced, not parametrised, without hooks."""
    return not any(type(layer) is not Linear or has_hooks(layer) for layer in layers)


def fuses(x: Tensor, *layers: nn.Module) -> bool:
    """Whether one kernel runs ``layers`` and what is between them: plain layers, a few tokens, no gradients."""
    weights: Any = [layer.weight for layer in layers] if is_plain(*layers) else None
    return weights is not None and use_decode_kernel(x, *weights)


def linear_of(layer: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``layer(function(*inputs))``, where backward computes the layer's input again: it is cheap and large."""
    if is_plain(layer):
        return project_recomputed(function, layer.weight, *inputs)  # type: ignore[arg-type]
    y: Tensor = layer(function(*inputs))
    return y


def gated_output(y: Tensor, gain: Tensor, x: Tensor, gate: nn.Module, out: nn.Module) -> Tensor:
    """``out(rms_norm(y) * gain * silu(gate(x)))``.

    ``y``: ``[batch, time, heads, d]``, normalised per head; ``gain``: ``[heads, d]``; ``x``: ``[batch, time, dim]``.
    """
    if fuses(x, gate, out):
        return decode.gated_output(y, gain, x, gate.weight, out.weight)  # type: ignore[arg-type]
    return linear_of(out, gated_norm, y, gain, gate(x))


def feed_forward(x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
    """SwiGLU, ``down(silu(a) * b)`` with ``a, b = up(x).chunk(2, -1)``."""
    if fuses(x, up, down):
        return decode.feed_forward(x, up.weight, down.weight)  # type: ignore[arg-type]
    return linear_of(down, swiglu, up(x))
