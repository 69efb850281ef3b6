"""The memory networks and the features of keys and queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .parts import Apply, Features, Network, register_features, register_network

Function = Callable[[Tensor], Tensor]


@register_network("linear")
class Linear(Network):
    """One matrix: ``M(x) = W x``."""

    def forward(self, apply: Apply, x: Tensor, activation: Function, matrices: int) -> Tensor:
        return apply(0, x)

    def shapes(self, d_in: int, d_out: int, depth: int, expansion: int) -> list[tuple[int, int]]:
        return [(d_out, d_in)]


@register_network("mlp")
class MLP(Network):
    """``depth`` matrices with the activation between them: ``M(x) = W_L s(... s(W_1 x))``."""

    def forward(self, apply: Apply, x: Tensor, activation: Function, matrices: int) -> Tensor:
        for layer in range(matrices):
            x = apply(layer, activation(x) if layer else x)
        return x

    def shapes(self, d_in: int, d_out: int, depth: int, expansion: int) -> list[tuple[int, int]]:
        widths = [d_in, *[d_out * expansion] * (depth - 1), d_out]
        return [(out, width) for width, out in pairwise(widths)]


@register_network("gated_mlp")
class GatedMLP(Network):
    """Three matrices ``W1, W2, W3``: ``M(x) = W2 (s(W1 x) * (W3 x))``; SwiGLU with ``activation: silu``."""

    activation = "silu"

    def forward(self, apply: Apply, x: Tensor, activation: Function, matrices: int) -> Tensor:
        return apply(1, activation(apply(0, x)) * apply(2, x))

    def shapes(self, d_in: int, d_out: int, depth: int, expansion: int) -> list[tuple[int, int]]:
        hidden = d_out * expansion
        return [(hidden, d_in), (d_out, hidden), (hidden, d_in)]


@register_network("factorised")
class Factorised(Network):
    """Each layer is a product ``B_l A_l`` of low rank; the activation is between layers, not between factors."""

    def __init__(
        self, *, rank: Annotated[int | None, Field(ge=1, description="rank; null: half the width")] = None
    ) -> None:
        self.rank = rank

    def forward(self, apply: Apply, x: Tensor, activation: Function, matrices: int) -> Tensor:
        for layer in range(0, matrices, 2):
            x = apply(layer + 1, apply(layer, activation(x) if layer else x))
        return x

    def shapes(self, d_in: int, d_out: int, depth: int, expansion: int) -> list[tuple[int, int]]:
        rank = self.rank or max(1, min(d_in, d_out) // 2)
        layers = MLP().shapes(d_in, d_out, depth, expansion)
        return [shape for out, width in layers for shape in ((rank, width), (out, rank))]


@register_network("slots")
class Slots(Network):
    """Attention over slots: ``M(x) = V softmax(K x / sqrt(d_in))``, ``K`` and ``V`` are written."""

    def __init__(self, *, slots: Annotated[int, Field(ge=1, description="number of slots")] = 64) -> None:
        self.slots = slots

    def forward(self, apply: Apply, x: Tensor, activation: Function, matrices: int) -> Tensor:
        return apply(1, torch.softmax(apply(0, x) / math.sqrt(x.shape[-1]), dim=-1))

    def shapes(self, d_in: int, d_out: int, depth: int, expansion: int) -> list[tuple[int, int]]:
        return [(self.slots, d_in), (d_out, self.slots)]


@register_features("polynomial")
class Polynomial(Features):
    """Powers up to ``degree``, with coefficients ``a_i``.

    ``tensor``: ``(a_0, a_1 x, a_2 x (x) x, ...)`` side by side, of width ``1 + d + d^2 + ...``; with the default
    coefficients ``1 / sqrt(i!)``, inner products are the Taylor series of ``exp`` (ATLAS, arXiv 2505.23735, eq. 22).
    ``elementwise``: ``a_1 x + a_2 x^2 + ...``, of the width of ``x``, by default ``a_i = 1 / i!``.
    """

    def __init__(
        self,
        *,
        degree: Annotated[int, Field(ge=1, le=8, description="largest power")] = 2,
        form: Annotated[
            Literal["elementwise", "tensor"], Field(description="powers of each number, or all products of numbers")
        ] = "elementwise",
        coefficients: Annotated[
            list[float] | None, Field(description="a_0, a_1, ...; null: those of a Taylor series, learned in a block")
        ] = None,
    ) -> None:
        if isinstance(coefficients, list) and len(coefficients) != degree + 1:
            raise ValueError(f"coefficients: expected {degree + 1}, a_0 to a_{degree}, got {len(coefficients)}")
        self.degree, self.form, self.learned = degree, form, coefficients is None
        self.coefficients: list[float] | Tensor = self.initial() if coefficients is None else coefficients

    def initial(self) -> list[float]:
        """The coefficients of a Taylor series."""
        power = 1.0 if self.form == "elementwise" else 0.5
        return [math.factorial(i) ** -power for i in range(self.degree + 1)]

    def width(self, d_in: int) -> int:
        return d_in if self.form == "elementwise" else sum(d_in**i for i in range(self.degree + 1))

    def forward(self, x: Tensor) -> Tensor:
        a, power = self.coefficients, x
        if len(a) != self.degree + 1:  # a tensor that was set
            raise ValueError(f"coefficients: expected {self.degree + 1}, a_0 to a_{self.degree}, got {len(a)}")
        if self.form == "elementwise":
            y = a[1] * x
            for i in range(2, self.degree + 1):
                power = power * x
                y = y + a[i] * power
            return y
        parts = [a[0] * torch.ones_like(x[..., :1]), a[1] * x]
        for i in range(2, self.degree + 1):
            power = (power.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
            parts.append(a[i] * power)
        return torch.cat(parts, dim=-1)
