"""``ffn``: the feed-forward network applied to each token on its own."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.dispatch import use_decode_kernel as few
from ..kernels.linear import project_recomputed as project_made
from ..kernels.norm_gate import swiglu
from ..kernels.norm_gate.decode import feed_forward, prepare_feed_forward
from ..registry import register
from .block import Block, Decoder, check_input
from .linear import Linear, plain
from .state import State


@register("ffn")
class FeedForward(Block):
    """``down(silu(gate(x)) * up(x))`` (SwiGLU), or ``down(gelu(up(x)))``. Stateless.

    The default hidden width costs the same 8 dim^2 weights in both kinds: 8/3 dim for SwiGLU, rounded up to a
    multiple of 16, and 4 dim for GELU.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: Annotated[Literal["swiglu", "gelu"], Field(description="gated SiLU, or plain GELU")] = "swiglu",
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
        self.up = Linear(dim, 2 * hidden if kind == "swiglu" else hidden, bias=False)
        self.down = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        check_input(self, x, mask, like=self.up.weight)
        if self.kind == "swiglu" and plain(self.up, self.down) and few(x, self.up.weight, self.down.weight):
            y = feed_forward(x, self.up.weight, self.down.weight)
            return y if mask is None else torch.where(mask[..., None], y, 0.0), state
        inner = self.up(x)
        activation = swiglu if self.kind == "swiglu" else F.gelu
        y = project_made(activation, self.down.weight, inner) if plain(self.down) else self.down(activation(inner))
        return y if mask is None else torch.where(mask[..., None], y, 0.0), state

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        if step != 1 or self.kind != "swiglu" or not plain(self.up, self.down):
            return None
        run = prepare_feed_forward(self.up.weight, self.down.weight, (rows, time))
        return None if run is None else lambda x, state: (run(x), state)

    def reset_parameters(self) -> None:
        # as in attention: unit variance at every width, and a fifth of it into the residual stream
        nn.init.normal_(self.up.weight, std=self.dim**-0.5)
        nn.init.normal_(self.down.weight, std=0.2 * self.down.in_features**-0.5)

    def flops(self, length: int) -> int:
        """The matrix products."""
        return 2 * length * (self.up.weight.numel() + self.down.weight.numel())
