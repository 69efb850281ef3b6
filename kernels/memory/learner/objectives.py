"""The objectives of writing, by their derivatives with respect to the prediction. ``r = M(k) - v``."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .parts import Objective, register_objective


@register_objective("l2")
class SquaredError(Objective):
    """``|r|^2``, whose derivative is ``2 r`` (Titans, eq. 12)."""

    def error(self, prediction: Tensor, target: Tensor, parameter: Tensor | None) -> Tensor:
        return 2 * (prediction - target)


@register_objective("l2_half")
class HalfSquaredError(Objective):
    """``|r|^2 / 2``, whose derivative is ``r`` (the delta rules, TTT)."""

    def error(self, prediction: Tensor, target: Tensor, parameter: Tensor | None) -> Tensor:
        return prediction - target


@register_objective("dot")
class DotProduct(Objective):
    """``-<M(k), v>``, whose derivative is ``-v`` (linear attention, LaCT)."""

    def error(self, prediction: Tensor, target: Tensor, parameter: Tensor | None) -> Tensor:
        # as a function of the prediction, so that derivatives of it are zero and not missing
        return 0 * prediction - target


@register_objective("lp")
class LpError(Objective):
    """``sum |r|^p``, whose derivative is ``p |r|^(p - 1) sign(r)`` (Moneta, arXiv 2504.13173)."""

    def __init__(
        self,
        *,
        p: Annotated[float, Field(ge=1, le=16, description="exponent")] = 3.0,
        smooth: Annotated[
            float | None, Field(gt=0, description="tanh(smooth r) in place of sign(r); null: sign(r)")
        ] = None,
    ) -> None:
        self.p, self.smooth = p, smooth

    def error(self, prediction: Tensor, target: Tensor, parameter: Tensor | None) -> Tensor:
        r = prediction - target
        if self.smooth is None and self.p >= 2:
            return self.p * r * r.abs() ** (self.p - 2)
        sign = torch.sign(r) if self.smooth is None else torch.tanh(self.smooth * r)
        if self.p == 1:
            return sign
        # the power has no derivative at zero, where the result is zero
        zero = r == 0
        return self.p * torch.where(zero, 0.0, torch.where(zero, 1.0, r).abs() ** (self.p - 1)) * sign


@register_objective("huber")
class Huber(Objective):
    """The derivative of ``|r|^2`` up to a threshold ``delta``, and of ``delta |r|_1`` above it (Yaad, 2504.13173).

    ``form: norm``: ``2 r`` where ``|r|_2 <= delta``, else ``delta sign(r)``, as Yaad's equation has it.
    ``form: elementwise``: ``r`` clamped to ``[-delta, delta]``, the derivative of Huber's loss.
    """

    def __init__(
        self,
        *,
        delta: Annotated[
            float | None, Field(gt=0, description="threshold; null: learned, one for each token and head")
        ] = 1.0,
        form: Annotated[
            Literal["norm", "elementwise"], Field(description="one threshold for a token's error, or for each number")
        ] = "norm",
    ) -> None:
        self.delta: float | Tensor | None = delta
        self.form = form

    @property
    def learned(self) -> bool:  # type: ignore[override]
        return self.delta is None

    @property
    def per_token(self) -> Tensor | None:  # type: ignore[override]
        return self.delta if isinstance(self.delta, Tensor) else None

    def error(self, prediction: Tensor, target: Tensor, parameter: Tensor | None) -> Tensor:
        delta = self.delta if parameter is None else parameter
        if delta is None:
            raise ValueError("objective: huber: delta is null, and no threshold for each token is given")
        r = prediction - target
        if self.form == "elementwise":
            return torch.minimum(torch.maximum(r, -delta * torch.ones_like(r)), delta * torch.ones_like(r))
        size = torch.linalg.vector_norm(r.detach(), dim=-1, keepdim=True)
        return torch.where(size <= delta, 2 * r, delta * torch.sign(r))
