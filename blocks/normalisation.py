"""``rms_norm`` and ``layer_norm``: normalising each token's features, with a learned gain. Stateless."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.norm_gate import rms_norm
from ..kernels.norm_gate.decode import prepare_rms_norm
from ..registry import register
from .block import Block, Decoder, check_input
from .state import State

Eps = Annotated[float, Field(gt=0, description="added to the mean square before its root")]


class _Norm(Block):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim)
        self.eps = eps
        self.gain = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        check_input(self, x, mask, like=self.gain)
        y = self.normalise(x)
        return y if mask is None else torch.where(mask[..., None], y, 0.0), state

    def normalise(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define normalise(x)")

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def flops(self, length: int) -> int:
        """Element by element: square, add, scale, gain (and a subtraction and its mean in ``layer_norm``)."""
        return 4 * self.dim * length


@register("rms_norm")
class RMSNorm(_Norm):
    """``x / rms(x) * gain``."""

    def __init__(self, dim: int, *, eps: Eps = 1e-6) -> None:
        super().__init__(dim, eps)

    def normalise(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gain, self.eps)

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        run = prepare_rms_norm(self.gain, (rows, time), self.eps) if step == 1 else None
        return None if run is None else lambda x, state: (run(x), state)


@register("layer_norm")
class LayerNorm(_Norm):
    """``(x - mean(x)) / std(x) * gain``, without a bias."""

    def __init__(self, dim: int, *, eps: Eps = 1e-6) -> None:
        super().__init__(dim, eps)

    def normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.gain, None, self.eps)

    def flops(self, length: int) -> int:
        return 6 * self.dim * length
