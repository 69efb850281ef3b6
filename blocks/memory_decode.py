"""One token of each row of a memory: the kernel that computes the inputs of the operation from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.linear import fuses, is_plain
from ..kernels.memory import Tokens, read_memory
from ..kernels.short_conv.decode import Layers, memory_inputs, memory_query


def decode_layers(memory: Any, x: Tensor) -> Layers | None:
    """The parameters of the kernel for ``x`` ``[batch, 1, dim]``, or ``None`` where it cannot run."""
    if memory.rule is not None or memory.gates != "token" or memory.use != "both" or not is_plain(memory.controls):
        return None
    if x.shape[1] != 1 or not fuses(x, memory.qkv, memory.output_gate, memory.output):
        return None
    gates, hard = memory.controls, memory.gating == "hard_sigmoid"
    return Layers(memory.qkv.weight, memory.convolution, memory.heads, gates.weight, gates.bias, memory.max_step, hard)


def inputs(memory: Any, x: Tensor, state: Any) -> tuple[Tokens, Tensor | None, None] | None:
    """``memory.inputs(x, state, None)``; ``None`` where the kernel cannot run."""
    layers = decode_layers(memory, x)
    if layers is None:
        return None
    q, k, v, (theta, *others), history = memory_inputs(x, state.convolution, layers)
    eta, alpha = others[0] if memory.momentum else None, others[-1] if memory.forgetting else None
    return Tokens(q, k, v, theta, eta, alpha), history, None


def read(memory: Any, x: Tensor, state: Any) -> Tensor | None:
    """``memory.read(x, state)``; ``None`` where the kernel cannot run."""
    layers = decode_layers(memory, x)
    if layers is None:
        return None
    q = memory_query(x, state.convolution, layers.queries())
    output: Tensor = memory.project_output(read_memory(q, state.memory.weights, memory.activation, memory.norm_gain), x)
    return output
