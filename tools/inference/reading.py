"""Reading a text of any length piece by piece, in constant memory: how far, and how well it is predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...blocks.language_model import LanguageModel
from ...blocks.state import State, named_tensors

PIECE = 1024
"""Tokens that are read in one call of the model."""

DOUBLING = tuple(2**power for power in range(7, 62))
"""Default edges of buckets: 128, 256, 512, ...; each bucket is as long as all before it."""

MAX_LOGITS = 2**24
"""Logits that are held at once: pieces are shorter where the vocabulary is large."""


def split(pieces: Tensor | Iterable[Tensor], size: int = PIECE) -> Iterator[Tensor]:
    """A tensor, or each piece, ``[batch, time]``, in pieces of at most ``size`` tokens."""
    for piece in [pieces] if isinstance(pieces, Tensor) else pieces:
        yield from piece.split(size, dim=1)


def position(model: LanguageModel, state: State) -> int | None:
    """Tokens that ``state``, of one row, has read, as its blocks count them; ``None`` where no block counts."""

    def counts(of: Any) -> dict[str, int]:
        return {path: int(leaf[0]) for path, leaf in named_tensors(of) if path.rpartition(".")[2] == "position"}

    found = counts(state)
    # inner blocks may count from elsewhere: the attention of a segment starts anew with each segment
    outermost = min((path.count(".") for path in found), default=0)
    with torch.no_grad():
        initial = counts(model.init_state(1))  # persistent tokens are read before the first
    return max((count - initial[path] for path, count in found.items() if path.count(".") == outermost), default=None)


class Bucket(NamedTuple):
    """The tokens at positions ``start`` to ``stop - 1`` (``stop`` is ``None``: to the end)."""

    start: int
    stop: int | None
    tokens: int
    """Predicted tokens, over all rows. The first of the text is not predicted."""
    loss: float
    """Mean cross-entropy of a token, in nats."""

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return _exp(self.loss)


class Perplexity(NamedTuple):
    """The loss of a text as a whole and by position."""

    tokens: int
    """Predicted tokens, over all rows."""
    loss: float
    """Mean cross-entropy of a token, in nats; NaN where no token was predicted."""
    buckets: list[Bucket]
    """Those with tokens, in order."""
    state: State
    """The state after the text."""

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

    ``tokens``: int64 ``[batch, time]``, or an iterable of pieces of it of any lengths. ``state``: the state before the
    text (fresh by default). ``edges``: the positions, increasing, at which buckets end. ``on_piece`` is called after
    each piece with the number of tokens of each row that were read.

    Call it inside ``with model.freeze_memory():`` to measure the model without learning at test time. Raises
    ``ValueError`` for edges that do not increase, ``TypeError`` for a text, and what the model's ``forward`` raises.
    """
    if isinstance(tokens, str | bytes):
        raise TypeError("tokens: expected an int64 tensor [batch, time] or pieces of it, got a text: encode it first")
    if any(b <= a for a, b in zip((0, *edges), edges)):
        raise ValueError(f"edges: expected increasing positions > 0, got {list(edges)}")
    device = next(model.parameters()).device
    bounds = torch.tensor(list(edges), dtype=torch.int64)
    sums = torch.zeros(len(edges) + 1, dtype=torch.float64)
    counts = torch.zeros(len(edges) + 1, dtype=torch.int64)
    last: Tensor | None = None
    read = 0
    for piece in split(tokens, max(64, min(PIECE, MAX_LOGITS // (model.vocab or 1)))):
        if piece.shape[1] == 0:
            continue
        piece = piece.to(device)
        out = model(piece, state)
        state = out.state
        assert out.logits is not None  # the model was given tokens
        losses = _losses(out.logits[:, :-1], piece[:, 1:])
        start = read + 1
        if last is not None:
            losses = torch.cat([_losses(last.unsqueeze(1), piece[:, :1]), losses], dim=1)
            start = read
        index = torch.bucketize(torch.arange(start, start + losses.shape[1]), bounds, right=True)
        sums.index_add_(0, index, losses.sum(dim=0))
        counts.index_add_(0, index, torch.full_like(index, losses.shape[0]))
        last = out.logits[:, -1].clone()  # a view would keep all of them
        read += piece.shape[1]
        if on_piece is not None:
            on_piece(read)
    buckets = [
        Bucket(start, stop, count, total / count)
        for start, stop, count, total in zip((0, *edges), (*edges, None), counts.tolist(), sums.tolist())
        if count
    ]
    predicted = int(counts.sum())
    return Perplexity(predicted, float(sums.sum()) / predicted if predicted else math.nan, buckets, state)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """``[batch, time, vocab]``, ``[batch, time]`` -> nats ``[batch, time]``, float64 on the CPU."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).cpu().double()


def _exp(loss: float) -> float:
    return float(torch.tensor(loss, dtype=torch.float64).exp())  # infinity where math.exp raises
