"""Norms and gating, the layers inside blocks. ``rms_norm`` and ``layer_norm`` are blocks themselves."""

from __future__ import annotations

import string
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.norm_gate import gate, rms_norm
from ..registry import register
from .block import Block, with_parameters
from .state import State

Eps = Annotated[float, Field(gt=0, description="added to the mean square (or the variance) for numerical stability")]
Form = Literal["sigmoid", "silu", "sum"]


class Norm(Block):
    """Normalization of each token's features, with a learned gain. Stateless."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim)
        self.eps = eps
        self.gain = nn.Parameter(torch.empty(dim))

    @property
    def weight(self) -> Tensor:
        """The gain, by the name that norms of PyTorch have for it: models of transformers ask every norm for it."""
        return self.gain

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)


@register("rms_norm")
class RMSNorm(Norm):
    """Root mean square normalization, ``x / rms(x) * gain``."""

    sharding = "local"

    def __init__(self, dim: int, *, eps: Eps = 1e-6) -> None:
        super().__init__(dim, eps)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        # zeros have the norm zero, and NaN at masked tokens must not reach gradients
        return rms_norm(x if mask is None else torch.where(mask[..., None], x, 0.0), self.gain, self.eps), state


@register("layer_norm")
class LayerNorm(Norm):
    """Layer normalization without a bias, ``(x - mean(x)) / std(x) * gain``."""

    sharding = "local"

    def __init__(self, dim: int, *, eps: Eps = 1e-6) -> None:
        super().__init__(dim, eps)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        x = x if mask is None else torch.where(mask[..., None], x, 0.0)
        return F.layer_norm(x, (self.dim,), self.gain, None, self.eps), state


class Gating(nn.Module):
    """``gate(a, b) = norm(a) * sigmoid(norm(b))``, with RMS norms that have learned gains (paper 4.2).

    The form ``silu`` is ``norm(a) * silu(norm(b))``, and ``sum`` is ``norm(a) + norm(b)``. Each further input is a
    further factor, or a summand. Zero inputs give zero outputs in every form, so outputs at masked tokens are zero.
    """

    eps = 1e-6

    def __init__(self, dim: int, form: Form = "sigmoid", branches: int = 2) -> None:
        super().__init__()
        self.form = form
        self.gain_a = nn.Parameter(torch.empty(dim))
        self.gain_b = nn.Parameter(torch.empty(dim))
        self.others = [f"gain_{letter}" for letter in string.ascii_lowercase[2:branches]]
        """The names of the gains of further inputs."""
        for name in self.others:
            self.register_parameter(name, nn.Parameter(torch.empty(dim)))

    def reset_parameters(self) -> None:
        for gain in self.parameters():
            nn.init.ones_(gain)

    def forward(self, a: Tensor, b: Tensor, *others: Tensor) -> Tensor:
        """Inputs and output: ``[..., dim]``."""
        if self.form == "sigmoid":
            y = gate(a, b, self.gain_a, self.gain_b, self.eps)
        else:
            a, b = rms_norm(a, self.gain_a, self.eps), rms_norm(b, self.gain_b, self.eps)
            y = a * F.silu(b) if self.form == "silu" else a + b
        for x, name in zip(others, self.others):
            x = rms_norm(x, getattr(self, name), self.eps)
            y = y + x if self.form == "sum" else y * self._activation(x)
        return y

    @with_parameters
    def gate_values(self, b: Tensor, *others: Tensor) -> Tensor:
        """Return the factor of ``norm(a)`` for the other inputs, all ``[..., dim]``. 1 for the form ``sum``."""
        if self.form == "sum":
            return torch.ones_like(b)
        values = self._activation(rms_norm(b, self.gain_b, self.eps))
        for x, name in zip(others, self.others):
            values = values * self._activation(rms_norm(x, getattr(self, name), self.eps))
        return values

    def _activation(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.form == "silu" else torch.sigmoid(x)
