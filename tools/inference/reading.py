"""Reading a text of any length piece by piece, in memory that grows only if the model's state does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...blocks.generation import read_prompt
from ...blocks.language_model import LanguageModel
from ...blocks.state import State, named_tensors

PIECE = 1024
"""Tokens that are read in one call of the model."""


class Reading(NamedTuple):
    """Where a model stands in a text."""

    state: State
    """Has read every token so far."""
    logits: Tensor | None
    """``[batch, vocab]``: the prediction of the token after the last; ``None`` before the first."""
    tokens: int
    """Tokens of each row that were read."""


def read_text(model: LanguageModel, pieces: Tensor | Iterable[Tensor], state: State = None) -> Reading:
    """Read ``pieces``, int64 ``[batch, time]`` each and of any lengths, from ``state`` (fresh if not given).

    Memory is that of one piece and one state: an iterator may bring a text of any length, and what was read can go.
    A tensor is cut into pieces. How a text is cut changes nothing but the rounding. Gradients are not tracked.

    Raises what the model's ``forward`` refuses: token ids out of its vocabulary, a state of another model.
    """
    reading = Reading(state, None, 0)
    for reading in readings(model, pieces, state):  # noqa: B007 - the last one is what is wanted
        pass
    return reading


def readings(model: LanguageModel, pieces: Tensor | Iterable[Tensor], state: State = None) -> Iterator[Reading]:
    """``read_text``, told after every piece: for a caller that shows how far it is, or stops early."""
    tokens = 0
    for piece in cut(pieces):
        if piece.shape[1] == 0:
            continue
        logits, state = read_prompt(model, piece, state)
        tokens += piece.shape[1]
        yield Reading(state, logits, tokens)


def cut(pieces: Tensor | Iterable[Tensor], size: int = PIECE) -> Iterator[Tensor]:
    """``[batch, time]`` each: a tensor in pieces of ``size`` tokens; of others those that are longer."""
    for piece in [pieces] if isinstance(pieces, Tensor) else pieces:
        yield from piece.split(size, dim=1)


def position(model: LanguageModel, state: State) -> int | None:
    """Tokens that ``state``, of one row, has read, as its blocks count them; ``None`` where no block counts."""

    def counts(of: Any) -> dict[str, int]:
        return {path: int(leaf[0]) for path, leaf in named_tensors(of) if path.rpartition(".")[2] == "position"}

    found = counts(state)
    # what is further in may count otherwise: the attention of a segment begins anew with each
    outermost = min((path.count(".") for path in found), default=0)
    with torch.no_grad():
        fresh = counts(model.init_state(1))  # persistent tokens have been read before the first
    return max((count - fresh[path] for path, count in found.items() if path.count(".") == outermost), default=None)
