"""What a learner carries from token to token, and what it is given for each write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dispatch import known, shows_values
from ..state import MemoryState


class LearnerState(NamedTuple):
    """The state of a learner. Every tensor has the batch row first; a part that the rule does not need is empty.

    The first four fields are those of ``MemoryState``.
    """

    weights: tuple[Tensor, ...]
    """Weights after the last token, ``[batch, heads, out, in]``, float32 or float64."""
    momentum: tuple[Tensor, ...]
    """The first momentum, same shapes; ``()`` without one."""
    anchor: tuple[Tensor, ...]
    """The weights at the start of the current chunk."""
    position: Tensor
    """``[batch]`` int64: tokens read so far by each row."""
    initial: tuple[Tensor, ...] = ()
    """The weights that a reset, or a new document, begins from."""
    second: tuple[Tensor, ...] = ()
    """The second momentum, where there are two."""
    pending: tuple[Tensor, ...] = ()
    """Of a rule that moves once a chunk, for the current chunk: the sum of the gradients of each matrix, the sums of
    ``eta`` and of ``theta`` ``[batch, heads]``, and the product of what is kept."""
    recent: tuple[Tensor, ...] = ()
    """Of a window of ``c`` writes, the last ``c - 1``, the latest at the end: keys, values, weights, and parameters of
    the objective, if it has them, ``[batch, heads, c - 1, ...]``; and their number ``[batch]``."""
    projection: Tensor | None = None
    """``[batch, heads, d_in, d_in]``: the projection on the keys since the last reset, for projected queries."""

    @classmethod
    def fresh(cls, weights: Iterable[Tensor], momentum: Iterable[Tensor] | None = None) -> LearnerState:
        """The state before the first token, for the parameters of any network.

        Args:
            weights: one for each parameter, ``[batch, heads, ...]``, float32 or float64.
            momentum: of the same shapes; zero unless given.

        Raises:
            ValueError, TypeError: a tensor does not fit; the message names it.
        """
        weights = tuple(weights)
        if not weights:
            raise ValueError("weights: expected a tensor [batch, heads, ...] for each parameter, got none")
        for i, w in enumerate(weights):
            if not isinstance(w, Tensor) or w.dtype not in (torch.float32, torch.float64):
                got = w.dtype if isinstance(w, Tensor) else type(w).__name__
                raise TypeError(f"weights[{i}]: expected a float32 or float64 tensor, got {got}")
            if w.dim() < 2 or w.shape[:2] != weights[0].shape[:2] or w.dtype != weights[0].dtype:
                raise ValueError(f"weights[{i}]: expected [batch, heads, ...] and the dtype of weights[0], got "
                                 f"{w.dtype} {list(w.shape)}")  # fmt: skip
        start = tuple(torch.zeros_like(w) for w in weights) if momentum is None else tuple(momentum)
        if [x.shape for x in start] != [w.shape for w in weights][: len(start)]:
            raise ValueError("momentum: expected the shapes of weights")
        position = torch.zeros(weights[0].shape[0], dtype=torch.int64, device=weights[0].device)
        return cls(weights, start, weights, known(position, [0] * len(position)), weights)

    def map(self, function: Callable[[Tensor], Tensor]) -> LearnerState:
        """``function`` of every floating-point tensor."""
        return self.rows(lambda x: function(x) if x.is_floating_point() else x)

    def rows(self, pick: Callable[[Tensor], Tensor]) -> LearnerState:
        """``pick`` of every tensor, such as a selection of rows."""
        parts: list[Any] = []
        for part in self:
            if isinstance(part, tuple):
                parts.append(tuple(map(pick, part)))
            else:
                parts.append(None if part is None else pick(part))
        return LearnerState(*parts)

    def plain(self) -> MemoryState:
        """The fields that ``MemoryState`` has."""
        return MemoryState(*self[:4])

    def has(self, part: str) -> bool:
        """Whether the field ``part``, which may be empty, is not."""
        return isinstance(x := getattr(self, part), Tensor) or bool(x)

    def beyond(self, parts: Collection[str]) -> list[str]:
        """What a rule that knows no fields but ``parts`` and those of ``MemoryState`` would lose.

        A field at the value that it has before the first token is no loss, and neither are the initial weights.
        """
        lost = []
        for name in ("second", "pending", "recent", "projection"):
            if name in parts or not self.has(name):
                continue
            held = getattr(self, name)
            if name == "pending":  # the product of what is kept begins as one
                held = (*held[:-1], held[-1] - 1)
            elif name == "recent":  # their number
                held = held[-1:]
            if any(not shows_values(x) or bool(x.any()) for x in ((held,) if isinstance(held, Tensor) else held)):
                lost.append(name)
        return lost


class Writes(NamedTuple):
    """What a learner is given, in the order of the writes. Gates that a rule does not have are ``None``."""

    q: Tensor
    """``[batch, time, heads, d_in]``; in a span of a chunk, as all that follow: ``[batch, heads, time, ...]``."""
    k: Tensor
    v: Tensor
    theta: Tensor
    """``[batch, time, heads]``."""
    eta: Tensor | None
    alpha: Tensor | None
    """``[batch, time, heads]``, or ``[batch, time, heads, channels]``."""
    gamma: Tensor | None
    """``[batch, time, heads]``: the weight of the token in every window."""
    parameter: Tensor | None
    """``[batch, time, heads]``: a parameter of the objective."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Writes:
        """``function`` of every tensor that is not ``None``."""
        return Writes(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]

    def at(self, span: slice) -> Writes:
        """The tokens of a span of time."""
        return self.map(lambda x: x[:, span])


def where(rows: Tensor | bool, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``new`` in the rows where ``rows`` is true, ``old`` in the others. ``rows``: ``[batch]``, or one for all."""
    if isinstance(rows, bool):
        return new if rows else old
    return tuple(torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, old))
