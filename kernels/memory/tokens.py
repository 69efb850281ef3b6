"""What every path of the memory operation takes, and what it gives: one signature for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from .state import MemoryState


class Tokens(NamedTuple):
    """What is learned and asked, token by token; a gate that the memory does not have is ``None``."""

    q: Tensor
    """``[batch, time, heads, d_in]``."""
    k: Tensor
    """The same."""
    v: Tensor
    """``[batch, time, heads, d_out]``."""
    theta: Tensor
    """``[batch, time, heads]``, as the other gates."""
    eta: Tensor | None
    alpha: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """``change`` of every tensor there is."""
        q, k, v, theta, eta, alpha = self
        eta, alpha = None if eta is None else change(eta), None if alpha is None else change(alpha)
        return Tokens(change(q), change(k), change(v), change(theta), eta, alpha)

    def at(self, span: slice) -> Tokens:
        """Those of a span of time."""
        return self.map(lambda x: x[:, span])


class Options(NamedTuple):
    """Which function of its tensors a memory is, and how it is computed."""

    chunk: int
    """Tokens per chunk."""
    activation: str
    """Between the network's layers: a name of ``activation.ACTIVATIONS``."""
    clip: float | None
    """Largest norm of one token's gradient; ``None`` for no bound."""
    read: str
    """``"after"`` the token was written, or ``"before"``."""
    keep: int | None = None
    """Chunks from one state that is kept for backward to the next, where states are; ``None``: as a path sees fit."""
    half: str | None = None
    """What a path may round a product's operands to: ``precision.half`` of the queries."""
    threshold: float | None = None
    """Below this surprise a token neither writes nor forgets; ``None``: every token does."""


Path: TypeAlias = Callable[[Tokens, MemoryState, Tensor | None, Tensor | None, Options], tuple[Tensor, MemoryState]]
"""``path(tokens, state, norm, mask, options) -> y, state``: shapes and meanings as of ``titans_memory``, which has
checked them and brought the tensors to one dtype."""
