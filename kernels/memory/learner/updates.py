"""Retentions and optimizers: how the weights decay, and how gradients move them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from ....registry import Added
from .parts import Optimizer, Retention, register_optimizer, register_retention

First: TypeAlias = Annotated[bool, Field(description="decay before the gradient is taken; needs chunk 1")]


@register_retention("none")
class Keep(Retention):
    """Nothing is forgotten."""

    gates = "none"


@register_retention("scalar")
class Decay(Retention):
    """All weights of a head decay by ``1 - alpha`` (weight decay).

    ``first``: the gradient of a token is taken at the weights that have decayed for it (Gated DeltaNet).
    """

    def __init__(self, *, first: First = False) -> None:
        self.first = first


@register_retention("channel")
class ChannelDecay(Retention):
    """Each column of each matrix decays by its own ``1 - alpha`` (GLA, KDA, Titans' camera-ready).

    ``first``: the gradient of a token is taken at the weights that have decayed for it (KDA).
    """

    gates = "channel"

    def __init__(self, *, first: First = False) -> None:
        self.first = first


@register_retention("kl")
class Softmax(Retention):
    """``W_t = softmax((1 - alpha) log W_{t-1} + step)`` over each row (KL divergence; Memora, 2504.13173)."""

    def initial(self, parameter: Tensor) -> Tensor:
        return torch.softmax(parameter, dim=-1)

    def enter(self, weights: Tensor) -> Tensor:
        return weights.clamp(min=torch.finfo(weights.dtype).tiny).log()

    def leave(self, u: Tensor) -> Tensor:
        return torch.softmax(u, dim=-1)

    def refuse(self, weights: Sequence[Tensor]) -> str | None:
        # weights that were written may have become zero
        if all(bool((w.detach() >= 0).all() & (w.detach().sum(-1) > 0).all()) for w in weights):
            return None
        return "kl keeps each row of the weights a probability distribution: expected weights > 0"


@register_retention("lq")
class LqNorm(Retention):
    """The network runs with ``a / |a|_q^(q - 2)``; ``a`` decays and is moved (Moneta, arXiv 2504.13173).

    The state's weights are ``a``. The norm is that of a whole matrix. Its power is taken to be at least 1e-20: of a
    matrix that is nearly forgotten, ``1 / |a|`` would have no bound.
    """

    def __init__(self, *, q: Annotated[float, Field(gt=1, le=16, description="exponent of the norm")] = 4.0) -> None:
        self.q = q

    def scale(self, weights: Tensor) -> Tensor:
        # in units of the largest number, whose power may overflow; a matrix of zeros stays zero
        unit = weights.detach().abs().amax((-2, -1), keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        size = weights / unit
        # powers of squares are products where q is even
        size = size.square() ** (self.q / 2) if self.q % 2 == 0 else size.abs() ** self.q
        size = size.sum((-2, -1), keepdim=True)
        norm = unit * torch.where(size > 0, size, 1.0) ** (1 / self.q)
        return 1 / (norm ** (self.q - 2)).clamp(min=1e-20)


@register_retention("rows")
class RowNorm(Retention):
    """After a move, each row has the norm it had in the initial weights (LaCT, arXiv 2505.23884)."""

    uses_initial = True

    def project(self, u: Tensor, initial: Tensor | None) -> Tensor:
        assert initial is not None
        norm = lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # noqa: E731
        return u * (norm(initial) / norm(u).clamp(min=1e-5))


@register_retention("soft_threshold")
class SoftThreshold(Retention):
    """After a move, each weight is moved towards zero by ``by``: ``sign(W) max(|W| - by, 0)`` (L1)."""

    def __init__(self, *, by: Annotated[float, Field(ge=0, description="distance")] = 1e-4) -> None:
        self.by = by

    def project(self, u: Tensor, initial: Tensor | None) -> Tensor:
        return torch.sign(u) * (u.abs() - self.by).clamp(min=0)


@register_optimizer("step")
class Step(Optimizer):
    """A gradient step without momentum."""

    order = 0


@register_optimizer("momentum")
class Momentum(Optimizer):
    """Gradient steps with momentum (Titans, eq. 10); ``order: 2``: the momentum has momentum again."""

    def __init__(self, *, order: Annotated[Literal[1, 2], Field(description="number of momentum terms")] = 1) -> None:
        self.order = order


COEFFICIENTS = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "lact": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""Of the quintic Newton-Schulz iterations of Muon (K. Jordan, 2024) and of LaCT's code; the last go on."""


@register_optimizer("muon")
class Muon(Optimizer):
    """Steps along the orthogonalized momentum, by ``steps`` Newton-Schulz iterations (ATLAS, LaCT).

    ``scale: gradient``: ``S = eta S - theta G, W = A W + NS(S)``. ``scale: update``, as in ATLAS:
    ``S = eta S - G, W = A W + theta NS(S)``.
    """

    def __init__(
        self,
        *,
        steps: Annotated[int, Field(ge=0, le=20, description="Newton-Schulz iterations")] = 5,
        scale: Annotated[
            Literal["gradient", "update"], Field(description="what the step size theta multiplies")
        ] = "gradient",
        coefficients: Annotated[
            Literal["jordan", "lact"],
            Added(),
            Field(description="of the iterations: the same for all, or those of LaCT's code"),
        ] = "jordan",
    ) -> None:
        self.steps, self.scales_update, self.coefficients = steps, scale == "update", COEFFICIENTS[coefficients]

    def update(self, momentum: Tensor) -> Tensor:
        tall = momentum.shape[-2] > momentum.shape[-1]
        x = momentum.mT if tall else momentum
        # the norm has no derivative at zero, where the step is zero, and 1e7 beside it; there the step is taken to have
        # no derivative of the norm
        size = (x * x).sum((-2, -1), keepdim=True)
        x = x / (torch.where(size > 0, size, 1.0).sqrt() + 1e-7)
        coefficients = [self.coefficients[min(i, len(self.coefficients) - 1)] for i in range(self.steps)]
        iterate = _iterate_wide if x.shape[-1] >= 3 * x.shape[-2] else _iterate
        x = iterate(x.flatten(0, -3), coefficients).view(x.shape)
        return x.mT if tall else x


Coefficients = Sequence[tuple[float, float, float]]


def _iterate(x: Tensor, coefficients: Coefficients) -> Tensor:
    """Newton-Schulz iterations ``x <- (a + b g + c g²) x`` with ``g = x x'``, of ``[batch, rows, columns]``."""
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_wide(x: Tensor, coefficients: Coefficients) -> Tensor:
    """:func:`_iterate` of wide matrices, whose ``g`` is small: the polynomials of iterations are multiplied first.

    Those of three, because rounding errors of ``g`` grow tenfold with each.
    """
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for start in range(0, len(coefficients), 3):
        gram = x @ x.mT
        product: Tensor | None = None
        polynomial: Tensor | None = None
        for a, b, c in coefficients[start : start + 3]:
            if polynomial is not None:
                gram = polynomial @ gram @ polynomial
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
            product = polynomial if product is None else polynomial @ product
        x = x if product is None else product @ x
    return x
