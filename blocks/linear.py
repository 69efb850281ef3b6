"""The linear layer inside blocks: ``nn.Linear``, run by ``kernels.projection``."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.projection import project


class Linear(nn.Linear):
    """``nn.Linear``, fast on one token too. The block that holds it initialises it."""

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)
