"""How well a model predicts a text of any length, by position: does reading more of it help?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...blocks.language_model import LanguageModel
from ...blocks.state import State
from .reading import PIECE, cut

DOUBLING = tuple(2**power for power in range(7, 62))
"""Buckets by default: up to position 128, 256, 512, and on, each as long as all before it."""

MOST_LOGITS = 2**24
"""Predictions that are held at once: pieces are shorter where the vocabulary is large."""


class Bucket(NamedTuple):
    """The tokens at positions from ``start`` to before ``stop`` (``None``: to the end)."""

    start: int
    stop: int | None
    tokens: int
    """Predicted in it, over all rows. The first of all has nothing before it and is not."""
    loss: float
    """Mean cross-entropy of a token, in nats."""

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return _exp(self.loss)


class Perplexity(NamedTuple):
    """Of a text, whole and by position."""

    tokens: int
    """Predicted, over all rows."""
    loss: float
    """Mean cross-entropy of a token, in nats; NaN where no token was predicted."""
    buckets: list[Bucket]
    """Those in which there are tokens, in order."""
    state: State
    """Has read the text."""

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return _exp(self.loss)


@torch.no_grad()
def perplexity(
    model: LanguageModel,
    tokens: Tensor | Iterable[Tensor],
    state: State = None,
    *,
    edges: Sequence[int] = DOUBLING,
    on_piece: Callable[[int], None] | None = None,
) -> Perplexity:
    """Predict every token of a text from all before it, in constant memory.

    ``tokens``: int64 ``[batch, time]``, or an iterable of pieces of it of any lengths. ``state``: what was read before
    the text (nothing if not given). ``edges``: the positions in the text, increasing, at which buckets end.
    ``on_piece`` is told after each piece how many tokens of each row were read.

    ``with model.freeze_memory():`` around it says what the memory's learning was good for. Raises ``ValueError`` for
    edges that do not increase and whatever the model's ``forward`` refuses.
    """
    if any(b <= a for a, b in zip((0, *edges), edges)):
        raise ValueError(f"edges: expected increasing positions > 0, got {list(edges)}")
    model_device = next(model.parameters()).device
    bounds = torch.tensor(list(edges), dtype=torch.int64)
    sums = torch.zeros(len(edges) + 1, dtype=torch.float64)
    counts = torch.zeros(len(edges) + 1, dtype=torch.int64)
    last: Tensor | None = None
    read = 0
    for piece in cut(tokens, max(64, min(PIECE, MOST_LOGITS // (model.vocab or 1)))):
        if piece.shape[1] == 0:
            continue
        piece = piece.to(model_device)
        out = model(piece, state)
        state = out.state
        assert out.logits is not None  # the model took tokens
        losses = _losses(out.logits[:, :-1], piece[:, 1:])
        start = read + 1
        if last is not None:
            losses = torch.cat([_losses(last.unsqueeze(1), piece[:, :1]), losses], dim=1)
            start = read
        index = torch.bucketize(torch.arange(start, start + losses.shape[1]), bounds, right=True)
        sums.index_add_(0, index, losses.sum(dim=0))
        counts.index_add_(0, index, torch.full_like(index, losses.shape[0]))
        last = out.logits[:, -1].clone()  # not a view that keeps all of them
        read += piece.shape[1]
        if on_piece is not None:
            on_piece(read)
    buckets = [
        Bucket(begin, end, count, total / count)
        for begin, end, count, total in zip((0, *edges), (*edges, None), counts.tolist(), sums.tolist())
        if count
    ]
    predicted = int(counts.sum())
    return Perplexity(predicted, float(sums.sum()) / predicted if predicted else math.nan, buckets, state)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """``[batch, time, vocab]``, ``[batch, time]`` -> nats ``[batch, time]``, float64 on the CPU."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).cpu().double()


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
