"""The parts of a learner: interfaces, and the catalogues in which they are registered by name.

A part is a class whose constructor has typed keyword fields, which are its schema. A recipe, or an argument of
:func:`learn`, gives a part by its name, as a mapping ``{"type": name, field: value}``, or in Python as an object.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ....registry import Catalogue, check_settings, show
from ...dispatch import transforming


def pull_back(
    function: Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]],
    at: list[Tensor],
    upstream: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """The vector-Jacobian product of ``function`` at ``at`` with ``upstream(value)``, and the list it returns as well.

    Differentiable again where gradients are recorded. ``torch.func.vjp``, which takes no hooks on saved tensors and so
    no activation checkpointing, is used only where nothing else works.
    """
    if transforming() or torch.is_inference_mode_enabled():
        result: Any = torch.func.vjp(function, at, has_aux=True)
        value, vjp, others = result
        return vjp(upstream(value))[0], others
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [x if recorded and x.requires_grad else x.detach().requires_grad_() for x in at]
        value, others = function(leaves)
        found = torch.autograd.grad(
            value, leaves, upstream(value), create_graph=recorded, allow_unused=True, materialize_grads=True
        )
    return list(found), others if recorded else [x.detach() for x in others]


Class = TypeVar("Class", bound=type)
Apply = Callable[[int, Tensor], Tensor]
"""``apply(i, x)``: ``[..., in] -> [..., out]``, the product of ``x`` with matrix ``i`` of the network."""


class Network(abc.ABC):
    """A memory network ``M``: matrices, which are written, and what is computed with them.

    Each matrix is applied exactly once. The gradient of a token is then one outer product per matrix, and the learner
    needs nothing else to know about the network: errors come from automatic differentiation of ``forward``.
    """

    activation: ClassVar[str | None] = None
    """The activation if the caller chooses none; ``None``: ``gelu``."""

    @abc.abstractmethod
    def forward(self, apply: Apply, x: Tensor, activation: Callable[[Tensor], Tensor], matrices: int) -> Tensor:
        """``M(x)``: ``[..., d_in] -> [..., d_out]``, with ``matrices`` matrices given by ``apply``."""

    @abc.abstractmethod
    def shapes(self, d_in: int, d_out: int, depth: int, expansion: int) -> list[tuple[int, int]]:
        """``(out, in)`` of each matrix in a block with ``depth`` layers of relative width ``expansion``."""


class Objective:
    """What a token's step decreases: the distance between ``M(k)`` and ``v``.

    A subclass has ``loss``, or ``error``, its derivative, or both.
    """

    learned: bool = False
    """Whether a block learns a parameter for each token and head, which is positive."""
    per_token: Tensor | None = None
    """``[batch, time, heads]``: a parameter for each token, passed on to ``loss`` and ``error``."""

    def loss(self, prediction: Tensor, target: Tensor, parameter: Tensor | None) -> Tensor:
        """``[..., d_out], [..., d_out] -> [...]``. ``parameter``: ``[..., 1]``, from ``per_token``."""
        raise TypeError(f"{type(self).__name__} has no loss, only its derivative")

    def error(self, prediction: Tensor, target: Tensor, parameter: Tensor | None) -> Tensor:
        """The derivative of the loss with respect to the prediction, ``[..., d_out]``."""
        return pull_back(
            lambda p: (self.loss(p[0], target, parameter), []), [prediction], torch.ones_like
        )[0][0]  # fmt: skip


class Retention:
    """What is kept of the weights from token to token.

    The weights of the recurrence are ``U_t = A_t(U_{t-1}) + step``; the network runs with ``link(U_t)``.
    """

    gates: ClassVar[str] = "scalar"
    """The shape of ``alpha``: ``"none"``, ``"scalar"`` per head, or ``"channel"``: per column of each matrix."""
    first: bool = False
    """Whether weights decay before the gradient is taken; needs chunks of one write."""
    uses_initial: ClassVar[bool] = False
    """Whether ``project`` needs the initial weights."""

    @property
    def linear(self) -> bool:
        """Whether ``U`` is not changed but by decay and steps: ``project`` is the identity."""
        return type(self).project is Retention.project

    @property
    def linked(self) -> bool:
        """Whether the network runs with other weights than ``U``."""
        return self.scales or type(self).link is not Retention.link or type(self).leave is not Retention.leave

    @property
    def scales(self) -> bool:
        """Whether ``link`` multiplies each matrix by one number, its ``scale``."""
        return type(self).scale is not Retention.scale

    def initial(self, parameter: Tensor) -> Tensor:
        """The initial weights, of a parameter that may be any number."""
        return parameter

    def enter(self, weights: Tensor) -> Tensor:
        """``U`` of the weights that a state holds, ``[..., out, in]``."""
        return weights

    def leave(self, u: Tensor) -> Tensor:
        """The weights that a state holds, of ``U``."""
        return u

    def link(self, weights: Tensor) -> Tensor:
        """The weights that the network runs with, of those that the state holds."""
        return weights * self.scale(weights) if self.scales else weights

    def scale(self, weights: Tensor) -> Tensor:
        """In place of ``link``, where it multiplies each matrix by one number: ``[..., out, in] -> [..., 1, 1]``."""
        raise NotImplementedError

    def project(self, u: Tensor, initial: Tensor | None) -> Tensor:
        """``U`` after a move. ``initial``: the initial weights if ``uses_initial``."""
        return u

    def refuse(self, weights: Sequence[Tensor]) -> str | None:
        """Why these weights cannot be the initial ones, or ``None``."""
        return None


class Optimizer:
    """How gradients become steps."""

    order: int = 1
    """The number of momentum terms: 0 none, 1, or 2."""
    scales_update: bool = False
    """Whether ``theta`` multiplies the update and not the gradient."""

    @property
    def linear(self) -> bool:
        """Whether the step is the momentum itself: ``update`` is the identity, and has no scale."""
        return type(self).update is Optimizer.update and not self.scales_update

    def update(self, momentum: Tensor) -> Tensor:
        """The step of one matrix ``[..., out, in]``."""
        return momentum


class Features(abc.ABC):
    """A map of keys and queries before the network."""

    @abc.abstractmethod
    def width(self, d_in: int) -> int:
        """The width of the features of ``d_in`` numbers."""

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``[..., d_in] -> [..., width]``."""


GROUP = "titans_build.learners"
NETWORKS = Catalogue("network", f"{GROUP}.networks", base=Network, lead=None)
OBJECTIVES = Catalogue("objective", f"{GROUP}.objectives", base=Objective, lead=None)
RETENTIONS = Catalogue("retention", f"{GROUP}.retentions", base=Retention, lead=None)
OPTIMIZERS = Catalogue("optimizer", f"{GROUP}.optimizers", base=Optimizer, lead=None)
FEATURES = Catalogue("features", f"{GROUP}.features", base=Features, lead=None)
CATALOGUES = {"network": NETWORKS, "objective": OBJECTIVES, "retention": RETENTIONS, "optimizer": OPTIMIZERS,
              "features": FEATURES}  # fmt: skip
"""The catalogue of each kind of part."""


def register_network(name: str, *, replace: bool = False) -> Callable[[Class], Class]:
    """Register a subclass of ``Network``, to be used as ``network: name`` of the block ``memory`` and of ``learn``.

    The class has ``forward`` and ``shapes``.
    Its constructor's keyword parameters are the fields of the part. Raises ``ValueError`` for a name that is taken,
    unless ``replace=True``, and ``TypeError`` for a class that does not fit.
    """
    return NETWORKS.register(name, replace=replace)


def register_objective(name: str, *, replace: bool = False) -> Callable[[Class], Class]:
    """Register a subclass of ``Objective``, to be used as ``objective: name`` of the block ``memory`` and of ``learn``.

    The class has ``error`` or ``loss``.
    Its constructor's keyword parameters are the fields of the part. Raises ``ValueError`` for a name that is taken,
    unless ``replace=True``, and ``TypeError`` for a class that does not fit.
    """
    return OBJECTIVES.register(name, replace=replace)


def register_retention(name: str, *, replace: bool = False) -> Callable[[Class], Class]:
    """Register a subclass of ``Retention``, to be used as ``retention: name`` of the block ``memory`` and of ``learn``.

    The class has what differs from ``Retention``.
    Its constructor's keyword parameters are the fields of the part. Raises ``ValueError`` for a name that is taken,
    unless ``replace=True``, and ``TypeError`` for a class that does not fit.
    """
    return RETENTIONS.register(name, replace=replace)


def register_optimizer(name: str, *, replace: bool = False) -> Callable[[Class], Class]:
    """Register a subclass of ``Optimizer``, to be used as ``optimizer: name`` of the block ``memory`` and of ``learn``.

    The class has ``update``, or attributes that differ.
    Its constructor's keyword parameters are the fields of the part. Raises ``ValueError`` for a name that is taken,
    unless ``replace=True``, and ``TypeError`` for a class that does not fit.
    """
    return OPTIMIZERS.register(name, replace=replace)


def register_features(name: str, *, replace: bool = False) -> Callable[[Class], Class]:
    """Register a subclass of ``Features``, to be used as ``features: name`` of the block ``memory`` and of ``learn``.

    The class has ``width`` and ``forward``.
    Its constructor's keyword parameters are the fields of the part. Raises ``ValueError`` for a name that is taken,
    unless ``replace=True``, and ``TypeError`` for a class that does not fit.
    """
    return FEATURES.register(name, replace=replace)


def make_part(kind: str, given: Any) -> Any:
    """The part that a name, a mapping or an object stands for. Raises ``RecipeError`` with all problems."""
    catalogue = CATALOGUES[kind]
    if isinstance(given, str):
        given = {"type": given}
    if not isinstance(given, dict):
        if not isinstance(given, catalogue.base):
            raise TypeError(
                f"{kind}: expected one of {', '.join(catalogue.known_names())}, a mapping with its type, or an object "
                f"of a subclass of {catalogue.base.__name__}, got {show(given)}"
            )
        return given
    fields = dict(given)
    name = fields.pop("type", None)
    if not isinstance(name, str):
        raise ValueError(f"{kind}: expected a mapping with a type, one of {', '.join(catalogue.known_names())}, "
                         f"got {show(given)}")  # fmt: skip
    entry = catalogue.lookup(name)
    tensors = {key: value for key, value in fields.items() if isinstance(value, Tensor) and key in entry.fields}
    others = {key: value for key, value in fields.items() if key not in tensors}
    values = check_settings(f"{kind} {name}", entry.fields, others, kind)
    try:
        part = entry.cls(**values)
    except ValueError as error:
        raise ValueError(f"{kind}: {name}: {error}") from error
    for key, value in tensors.items():
        setattr(part, key, value)
    return part
