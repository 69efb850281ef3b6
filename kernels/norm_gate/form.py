"""The form ``y = norm(a) * f(norm(b))`` of all norms and gates, as the fused kernels take it."""

from __future__ import annotations

from typing import NamedTuple

NORM, GATE, GATED_NORM, SILU_GATE = range(4)
"""``norm(a)``; ``norm(a) * sigmoid(norm(b))``; ``norm(a) * silu(b)``; ``a * silu(b)``. As ``enum kind`` of cpu.c."""


class Form(NamedTuple):
    """What is computed of tokens of ``heads * dim`` numbers: ``norm(x) = x / sqrt(|x|^2 / divisor + eps) * gain``."""

    kind: int
    heads: int
    dim: int
    divisor: float = 1.0
    eps: float = 0.0
