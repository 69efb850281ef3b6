"""Any ``torch.nn.Module`` as a memory network: the general path, by ``torch.func.functional_call``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .parts import Objective, pull_back


class ModuleNetwork:
    """A module that maps ``[d_in]`` to ``[d_out]``. Its parameters, in order, are the weights that are written."""

    activation = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names = [name for name, _ in module.named_parameters()]
        if not self.names:
            raise ValueError(f"network: {type(module).__name__} has no parameters to write")

    def _call(self, weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(self.module, dict(zip(self.names, weights)), (x,))
        return y

    def read(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        """``[batch, heads, time, d_in] -> [batch, heads, time, d_out]`` with weights ``[batch, heads, ...]``."""
        over_time = torch.vmap(self._call, (None, 0))
        y: Tensor = torch.vmap(torch.vmap(over_time))(tuple(weights), x)
        return y

    def gradients(
        self, weights: Sequence[Tensor], k: Tensor, v: Tensor, objective: Objective, parameter: Tensor | None
    ) -> list[Tensor]:
        """The gradient of every token with respect to every parameter, ``[batch, heads, time, ...]``."""
        rows = [w.unsqueeze(2).expand(*w.shape[:2], k.shape[2], *w.shape[2:]) for w in weights]
        predict = torch.vmap(torch.vmap(torch.vmap(self._call)))
        upstream = lambda p: objective.error(p, v, parameter)  # noqa: E731
        return pull_back(lambda each: (predict(tuple(each), k), []), rows, upstream)[0]

    def refuse(self, weights: Sequence[Tensor], d_in: int, d_out: int, any_shape: bool) -> str | None:
        """Why the module cannot run with these weights, or ``None``."""
        shapes = [list(p.shape) for p in self.module.parameters()]
        got = [list(w.shape[2:]) for w in weights]
        if shapes != got:
            return f"network: expected state.weights [batch, heads, ...] of the module's shapes {shapes}, got {got}"
        if not any_shape and any(len(shape) != 2 for shape in shapes):
            return f"optimizer: muon takes matrices, and the network's parameters are {shapes}"
        with torch.no_grad():
            y = self._call(tuple(w[0, 0] for w in weights), weights[0].new_zeros(d_in)) if weights[0].numel() else None
        if y is not None and y.shape != (d_out,):
            return (f"network: {type(self.module).__name__}: expected outputs [{d_out}] as v for inputs [{d_in}], "
                    f"got {list(y.shape)}")  # fmt: skip
        return None
