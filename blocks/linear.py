"""The linear layer inside blocks: ``nn.Linear``, run by ``kernels.linear``."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.linear import project


class Linear(nn.Linear):
    """``nn.Linear``, fast on one token too. The block that holds it initialises it."""

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


def plain(*layers: nn.Module) -> bool:
    """Whether calling each is ``project`` and nothing more: not replaced, not parametrised, and without hooks."""
    return all(
        type(layer) is Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        for layer in layers
    )
