"""``ffn``: the position-wise feed-forward network."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.linear import fuses, linear, linear_of
from ..kernels.norm_gate import decode, swiglu
from ..registry import register
from .block import Block
from .state import State


@register("ffn")
class FeedForward(Block):
    """Feed-forward network: SwiGLU, ``down(silu(gate(x)) * up(x))``, or ``down(gelu(up(x)))``. Stateless.

    With the default hidden width, both kinds have 8 dim^2 weights: 8/3 dim for SwiGLU, rounded up to a multiple of
    16, and 4 dim for GELU.
    """

    sharding = "local"

    def __init__(
        self,
        dim: int,
        *,
        kind: Annotated[Literal["swiglu", "gelu"], Field(description="activation: SwiGLU or GELU")] = "swiglu",
        hidden: Annotated[
            int | None, Field(ge=1, le=2**20, description="hidden width; null for 8/3 dim (swiglu) or 4 dim (gelu)")
        ] = None,
    ) -> None:
        super().__init__(dim)
        if kind not in ("swiglu", "gelu"):
            raise ValueError(f"kind: expected 'swiglu' or 'gelu', got {kind!r}")
        if hidden is None:
            hidden = -(-8 * dim // 48) * 16 if kind == "swiglu" else 4 * dim
        self.kind = kind
        self.up = nn.Linear(dim, 2 * hidden if kind == "swiglu" else hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        if mask is not None:  # NaN at masked tokens must not reach gradients
            x = torch.where(mask[..., None], x, 0.0)
        if self.kind == "gelu":
            y = linear_of(self.down, F.gelu, linear(self.up, x))
        elif fuses(x, self.up, self.down):
            y = decode.feed_forward(x, self.up.weight, self.down.weight)
        else:
            y = linear_of(self.down, swiglu, linear(self.up, x))
        return y if mask is None else torch.where(mask[..., None], y, 0.0), state

    def reset_parameters(self) -> None:
        # as in attention: unit variance at every width, and a fifth of it for the residual stream
        nn.init.normal_(self.up.weight, std=self.dim**-0.5)
        nn.init.normal_(self.down.weight, std=0.2 * self.down.in_features**-0.5)
