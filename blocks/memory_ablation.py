"""Does a model's memory change while the model reads, and does that help? Measured on a text, with its uncertainty.

The text is read three times, from a fresh state each time: with memories *live*, as ever; *frozen*, so that they answer
from their initial weights; and *reset* to a fresh memory every so many tokens, so that they know only what was read
lately. Attention, convolutions and everything else go on as ever in all three. What live saves against frozen is what
writing is worth; what it saves against reset is what is remembered from farther back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..kernels.memory import MemoryState
from .freezing import freeze, thawed
from .language_model import IGNORED, LanguageModel
from .memory import NeuralMemoryState
from .state import State

SHORTEST = 32
"""Tokens of a row that can be checked: in fewer there is nothing to compare."""
BLOCKS = 64
"""Stretches that a row is cut into at most, and ``TOKENS_PER_BLOCK`` tokens that one has at least."""
TOKENS_PER_BLOCK = 16
FEWEST = 8
"""Stretches that neighbours are joined down to, at most, for a standard error."""
ROWS = 16
"""From so many rows on each is one observation; with fewer, each stretch of each is."""
CERTAIN = 2.0
"""Standard errors from which on a difference is called one."""


class Difference(NamedTuple):
    """A mean difference of losses (nats per token, positive: live is better) and its standard error."""

    mean: float
    error: float

    @property
    def is_certain(self) -> bool:
        """Farther from zero than ``CERTAIN`` standard errors."""
        return abs(self.mean) > CERTAIN * self.error


class MemoryCheck(NamedTuple):
    """What :func:`memory_check` found. Losses are means over the targets that count, in nats."""

    moved: float
    """How far live memories went from their initial weights, as a share of the norm of these."""
    live: float
    frozen: float
    reset: float
    reset_every: int
    """Tokens between resets."""
    writing: Difference
    """Frozen minus live: what it is worth that memories are written."""
    reaching_back: Difference
    """Reset minus live: what it is worth that they are written for longer than ``reset_every`` tokens."""
    positions: Tensor
    """``[blocks]`` int64: where each stretch of the rows begins, for the tensors below."""
    counts: Tensor
    """``[blocks]``: targets that count in it; float64, as the others."""
    losses: Tensor
    """``[3, blocks]``: mean losses live, frozen and reset; NaN where nothing counts."""
    errors: Tensor
    """``[2, blocks]``: standard errors of frozen minus live and reset minus live over the tokens of a stretch."""

    @property
    def changes(self) -> bool:
        """Whether memories change at test time."""
        return self.moved > 0

    @property
    def helps(self) -> bool:
        """Whether writing them lowers the loss, beyond ``CERTAIN`` standard errors."""
        return self.writing.mean > 0 and self.writing.is_certain

    def __str__(self) -> str:
        return "\n".join(self.verdict())

    def verdict(self, unit: str = "token") -> list[str]:
        """Three sentences with means and standard errors in bits per ``unit``; positive: live is better."""
        bits = 1 / math.log(2)

        def judged(difference: Difference, other: str, better: str, worse: str, open_: str) -> str:
            said = open_ if not difference.is_certain else better if difference.mean > 0 else worse
            mean, error = difference.mean * bits, difference.error * bits
            return f"{said}: {other} - live = {mean:+.4f} ± {error:.4f} bits per {unit}, of {self.live * bits:.4f}"

        changes = (
            f"memory changes at test time: its weights moved by {self.moved:.1%} of their norm"
            if self.changes
            else "memory does not change at test time: its weights did not move"
        )
        every = f"a reset every {self.reset_every:,} tokens"
        return [
            changes,
            judged(
                self.writing,
                "frozen",
                "writing helps, live beats frozen",
                "writing hurts, frozen beats live",
                "no difference shown between live and frozen",
            ),
            judged(
                self.reaching_back,
                "reset",
                f"it reaches back, live beats {every}",
                f"it holds on too long, {every} beats live",
                f"no difference shown between live and {every}",
            ),
        ]


def memory_check(
    model: LanguageModel,
    tokens: Tensor,
    *,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    reset_every: int | None = None,
    piece: int = 512,
    advance: Callable[[], None] = lambda: None,
) -> MemoryCheck:
    """Read ``tokens`` [batch, time] int64 with memories live, frozen and reset, and compare the losses.

    ``targets`` [batch, time] int64: as the model takes them, -100 where nothing counts; by default the next tokens.
    ``mask`` [batch, time] bool: false at tokens that are none.
    ``reset_every``: tokens between resets; by default an eighth of the time, between 16 and 1,024. ``piece``: tokens
    read at once; it changes nothing but the memory that is needed. ``advance`` is called after each piece.

    Standard errors are of means over stretches of the text, of at least 16 tokens and as long as it takes for these not
    to depend on each other, or over rows, from 16 of them on.

    The model is left as it was. Raises ``ValueError`` for a model whose memories are never written, one without a
    vocabulary, and for a text of under 32 tokens a row or without targets that count.
    """
    names = writing_memories(model)
    if not names:
        raise ValueError("memory_check: the model has no memory that is both written and read: nothing to compare")
    if model.vocab is None:
        raise ValueError("memory_check: the model has no vocabulary (vocab: null), so it has no loss to compare")
    targets = next_tokens(tokens) if targets is None else targets
    if mask is not None:
        targets = targets.masked_fill(~mask, IGNORED)
    rows, time = tokens.shape
    if time < SHORTEST:
        raise ValueError(f"memory_check: {time} tokens in a row: expected at least {SHORTEST}")
    if not bool((targets != IGNORED).any()):
        raise ValueError("memory_check: no target counts: all are -100")
    if reset_every is None:
        reset_every = min(max(time // 8, 16), 1024)
    if not 1 <= reset_every < time:
        raise ValueError(f"memory_check: reset_every {reset_every}: expected 1 to {time - 1}, fewer than the tokens")
    long = max(TOKENS_PER_BLOCK, math.ceil(time / BLOCKS))
    sums = torch.zeros(5, rows, math.ceil(time / long), dtype=torch.float64)
    squares, counts = torch.zeros_like(sums[:2]), torch.zeros_like(sums[0])
    with thawed(model), torch.no_grad():
        fresh = model.init_state(rows)
        live = frozen = reset = fresh
        cuts = sorted({*range(0, time, piece), *range(0, time, reset_every), time})
        for start, stop in pairwise(cuts):
            part, wanted = tokens[:, start:stop], targets[:, start:stop]
            real = None if mask is None else mask[:, start:stop]
            if start % reset_every == 0:
                reset = with_memories_of(reset, fresh)
            losses = []
            for state in (live, reset):
                out = model(part, state, real)
                losses.append((token_losses(out.logits, wanted), out.state))
                advance()
            with freeze(model):
                out = model(part, frozen, real)
            advance()
            (lived, live), (forgot, reset), froze = *losses, token_losses(out.logits, wanted)
            frozen = out.state
            values = torch.stack([lived, froze, forgot, froze - lived, forgot - lived])
            block = torch.arange(start, stop) // long
            sums.index_add_(2, block, values)
            squares.index_add_(2, block, values[3:].square())
            counts.index_add_(1, block, (wanted != IGNORED).cpu().double())
        moved = distance(live, fresh)
    per_block = counts.sum(0)
    means = sums.sum(1) / per_block  # NaN where nothing counts
    spread = (squares.sum(1) / per_block - means[3:].square()).clamp(min=0) * per_block / (per_block - 1)
    overall = (sums.sum((1, 2)) / counts.sum()).tolist()
    live_loss, frozen_loss, reset_loss, *_ = overall
    return MemoryCheck(
        moved=moved,
        live=live_loss,
        frozen=frozen_loss,
        reset=reset_loss,
        reset_every=reset_every,
        writing=_difference(sums[3], counts),
        reaching_back=_difference(sums[4], counts),
        positions=torch.arange(0, time, long),
        counts=per_block,
        losses=means[:3],
        errors=(spread / per_block).sqrt(),
    )


def writing_memories(model: nn.Module) -> list[str]:
    """Where the memories are that are written and read, frozen ones included: ``layers.0.blocks.0.memory``."""
    with thawed(model):
        return [name for name, child in model.named_modules() if getattr(child, "use", None) == "both"]


def next_tokens(tokens: Tensor) -> Tensor:
    """What follows each of ``tokens`` [batch, time]; after the last nothing counts."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], dim=1)


def token_losses(logits: Tensor | None, targets: Tensor) -> Tensor:
    """Cross-entropy (nats) of each target [batch, time], float64 on the CPU; zero where nothing counts."""
    assert logits is not None
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape).cpu().double()


def memories_of(state: State) -> list[MemoryState]:
    """Every memory in the tree that goes on learning: not the snapshot that a ``context`` block reads from."""
    if isinstance(state, MemoryState):
        return [state]
    if not isinstance(state, tuple):
        return []
    children = [child for name, child in _named(state) if name != "snapshot"]
    return [memory for child in children for memory in memories_of(child)]


def with_memories_of(state: State, other: State) -> State:
    """``state`` with all its memories replaced by those of ``other``, a state of the same model and rows."""
    if isinstance(state, MemoryState):
        return other
    if isinstance(state, NeuralMemoryState):
        # gates that are held for a chunk are of the chunk that the memory is in; the convolution's past is no memory
        return state._replace(memory=other.memory, gates=other.gates)
    if not isinstance(state, tuple):
        return state
    children = [with_memories_of(mine, theirs) for mine, theirs in zip(state, other)]
    return type(state)(*children) if hasattr(state, "_fields") else tuple(children)


def distance(state: State, fresh: State) -> float:
    """How far the weights of all memories are from those of ``fresh``, as a share of the norm of these."""
    far, norm = 0.0, 0.0
    for memory, start in zip(memories_of(state), memories_of(fresh)):
        for weight, first in zip(memory.weights, start.weights):
            far += float((weight - first).square().sum())
            norm += float(first.square().sum())
    return math.sqrt(far / norm) if norm else 0.0


def _named(state: tuple[Any, ...]) -> list[tuple[str, Any]]:
    names = getattr(state, "_fields", None) or [str(index) for index in range(len(state))]
    return list(zip(names, state))


def _difference(sums: Tensor, counts: Tensor) -> Difference:
    """Mean of ``sums`` over ``counts``, both ``[rows, stretches]``, and its standard error.

    With few rows stretches are the observations. Neighbours may depend on each other, which makes the error of their
    mean look too small; so neighbours are joined, again and again, and the largest of the errors counts.
    """
    mean = float(sums.sum() / counts.sum())
    if len(sums) >= ROWS:
        return Difference(mean, _error(sums.sum(1), counts.sum(1)))
    errors = [_error(sums, counts)]
    while sums.shape[1] >= 2 * FEWEST:
        sums, counts = (_joined(x) for x in (sums, counts))
        errors.append(_error(sums, counts))
    return Difference(mean, max(errors))


def _error(sums: Tensor, counts: Tensor) -> float:
    """The standard error of ``sums.sum() / counts.sum()``, each entry being one observation of several tokens."""
    real = counts > 0
    sums, counts = sums[real], counts[real]
    many = len(sums)
    if many < 2:
        return math.inf
    spread = (sums - sums.sum() / counts.sum() * counts).square().sum() * many / (many - 1)
    return float(spread.sqrt() / counts.sum())


def _joined(x: Tensor) -> Tensor:
    """Each two neighbours as one; a last one alone stays alone."""
    return torch.nn.functional.pad(x, (0, x.shape[1] % 2)).unflatten(1, (-1, 2)).sum(-1)
