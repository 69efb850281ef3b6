"""Ablation of the memories of a model on a text: losses with and without writing, with standard errors.

The text is processed three times from a fresh state: with *live* memories, unchanged; with *frozen* memories, which are
read with their initial weights and never written; and with memories that are *reset* to their initial state at regular
intervals. Attention, convolutions and everything else run unchanged. Frozen minus live is the benefit of writing, reset
minus live the benefit of what was written before the last reset.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..kernels.memory import LearnerState, MemoryState
from .freezing import freeze, thawed
from .language_model import IGNORED, LanguageModel
from .memory import NeuralMemoryState
from .state import State

SHORTEST = 32
"""Minimum number of tokens of a row."""
BLOCKS = 64
"""Maximum number of blocks of consecutive tokens that a row is divided into."""
TOKENS_PER_BLOCK = 16
"""Minimum number of tokens of a block."""
FEWEST_BLOCKS = 8
"""Blocks are merged for the standard error as long as at least this many remain."""
ROWS = 16
"""Number of rows from which each row is one observation. With fewer rows, each block is one."""
CERTAIN = 2.0
"""Number of standard errors beyond which a difference is significant."""


class Difference(NamedTuple):
    """A mean difference of losses in nats per token (positive: live is better), and its standard error."""

    mean: float
    error: float

    @property
    def is_certain(self) -> bool:
        """Whether the mean is more than ``CERTAIN`` standard errors from zero."""
        return abs(self.mean) > CERTAIN * self.error


class MemoryCheck(NamedTuple):
    """The results of :func:`memory_check`. Losses are means over the targets, in nats."""

    moved: float
    """Distance of the weights of live memories from the initial ones, relative to the norm of these."""
    live: float
    frozen: float
    reset: float
    reset_every: int
    """Tokens between resets."""
    writing: Difference
    """Frozen minus live: the benefit of writing."""
    reaching_back: Difference
    """Reset minus live: the benefit of what was written before the last reset."""
    positions: Tensor
    """``[blocks]`` int64: the first position of each block, for the tensors below."""
    counts: Tensor
    """``[blocks]`` float64: number of targets."""
    losses: Tensor
    """``[3, blocks]`` float64: mean losses live, frozen and reset. NaN without targets."""
    errors: Tensor
    """``[2, blocks]`` float64: standard errors of frozen minus live and reset minus live over the tokens."""

    @property
    def changes(self) -> bool:
        """Whether the memories change at test time."""
        return self.moved > 0

    @property
    def helps(self) -> bool:
        """Whether writing lowers the loss significantly."""
        return self.writing.mean > 0 and self.writing.is_certain

    def __str__(self) -> str:
        return "\n".join(self.verdict())

    def verdict(self, unit: str = "token") -> list[str]:
        """Three sentences, with means and standard errors in bits per ``unit`` (positive: live is better)."""
        bits = 1 / math.log(2)

        def sentence(difference: Difference, other: str, better: str, worse: str, unclear: str) -> str:
            result = unclear if not difference.is_certain else better if difference.mean > 0 else worse
            mean, error = difference.mean * bits, difference.error * bits
            return f"{result}: {other} - live = {mean:+.4f} ± {error:.4f} bits per {unit}, of {self.live * bits:.4f}"

        changes = (
            f"memory changes at test time: its weights moved by {self.moved:.1%} of their norm"
            if self.changes
            else "memory does not change at test time: its weights did not move"
        )
        every = f"a reset every {self.reset_every:,} tokens"
        return [
            changes,
            sentence(
                self.writing,
                "frozen",
                "writing helps, live beats frozen",
                "writing hurts, frozen beats live",
                "no difference shown between live and frozen",
            ),
            sentence(
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
    """Compare the losses on ``tokens`` [batch, time] int64 with memories live, frozen and reset.

    ``targets`` [batch, time] int64: -100 at positions without a target; by default the next tokens. ``mask`` [batch,
    time] bool: true at valid tokens. ``reset_every``: tokens between resets; by default an eighth of the time, between
    16 and 1,024. ``piece``: tokens per call, which affects only the use of device memory. ``advance``: called after
    each piece.

    With at least 16 rows, standard errors are those of the mean over rows. With fewer, they are those of the mean over
    blocks of at least 16 tokens, which are merged to account for their correlation.

    The model is not changed. Raises ``ValueError`` for a model without a vocabulary or without memories that are
    written, and for rows of under 32 tokens or without targets.
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
    size = max(TOKENS_PER_BLOCK, math.ceil(time / BLOCKS))
    sums = torch.zeros(5, rows, math.ceil(time / size), dtype=torch.float64)
    squares, counts = torch.zeros_like(sums[:2]), torch.zeros_like(sums[0])
    with thawed(model), torch.no_grad():
        fresh = model.init_state(rows)
        live = frozen = reset = fresh
        cuts = sorted({*range(0, time, piece), *range(0, time, reset_every), time})
        for start, stop in pairwise(cuts):
            part, wanted = tokens[:, start:stop], targets[:, start:stop]
            valid = None if mask is None else mask[:, start:stop]
            if start % reset_every == 0:
                reset = with_memories_of(reset, fresh)
            losses = []
            for state in (live, reset):
                out = model(part, state, valid)
                losses.append((token_losses(out.logits, wanted), out.state))
                advance()
            with freeze(model):
                out = model(part, frozen, valid)
            advance()
            (of_live, live), (of_reset, reset) = losses
            of_frozen, frozen = token_losses(out.logits, wanted), out.state
            values = torch.stack([of_live, of_frozen, of_reset, of_frozen - of_live, of_reset - of_live])
            block = torch.arange(start, stop) // size
            sums.index_add_(2, block, values)
            squares.index_add_(2, block, values[3:].square())
            counts.index_add_(1, block, (wanted != IGNORED).cpu().double())
        moved = distance(live, fresh)
    per_block = counts.sum(0)
    means = sums.sum(1) / per_block  # NaN without targets
    variance = (squares.sum(1) / per_block - means[3:].square()).clamp(min=0) * per_block / (per_block - 1)
    overall = (sums.sum((1, 2)) / counts.sum()).tolist()
    live_loss, frozen_loss, reset_loss, *_ = overall
    return MemoryCheck(
        moved=moved,
        live=live_loss,
        frozen=frozen_loss,
        reset=reset_loss,
        reset_every=reset_every,
        writing=mean_with_error(sums[3], counts),
        reaching_back=mean_with_error(sums[4], counts),
        positions=torch.arange(0, time, size),
        counts=per_block,
        losses=means[:3],
        errors=(variance / per_block).sqrt(),
    )


def writing_memories(model: nn.Module) -> list[str]:
    """Names of the memories that are written and read, including frozen ones: ``layers.0.blocks.0.memory``."""
    with thawed(model):
        return [name for name, child in model.named_modules() if getattr(child, "use", None) == "both"]


def next_tokens(tokens: Tensor) -> Tensor:
    """The targets of ``tokens`` [batch, time]: the next token, and none for the last."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], dim=1)


def token_losses(logits: Tensor | None, targets: Tensor) -> Tensor:
    """Cross-entropy of each target [batch, time] in nats, float64 on the CPU. Zero without a target."""
    assert logits is not None
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape).cpu().double()


def memories_of(state: State) -> list[MemoryState | LearnerState]:
    """The memories in a state. The snapshot that a ``context`` block reads from is not included."""
    if isinstance(state, (MemoryState, LearnerState)):
        return [state]
    if not isinstance(state, tuple):
        return []
    children = [child for name, child in _named(state) if name != "snapshot"]
    return [memory for child in children for memory in memories_of(child)]


def with_memories_of(state: State, other: State) -> State:
    """Replace the memories of ``state`` by those of ``other``, a state of the same model and rows."""
    if isinstance(state, (MemoryState, LearnerState)):
        return other
    if isinstance(state, NeuralMemoryState):
        # the gates of the current chunk belong to the memory, the inputs of the convolution do not
        return state._replace(memory=other.memory, gates=other.gates)
    if not isinstance(state, tuple):
        return state
    children = [with_memories_of(mine, theirs) for mine, theirs in zip(state, other)]
    return type(state)(*children) if hasattr(state, "_fields") else tuple(children)


def distance(state: State, fresh: State) -> float:
    """Distance of the weights of all memories from those of ``fresh``, relative to the norm of these."""
    squared, norm = 0.0, 0.0
    for memory, start in zip(memories_of(state), memories_of(fresh)):
        for weight, first in zip(memory.weights, start.weights):
            squared += float((weight - first).square().sum())
            norm += float(first.square().sum())
    return math.sqrt(squared / norm) if norm else 0.0


def _named(state: tuple[Any, ...]) -> list[tuple[str, Any]]:
    names = getattr(state, "_fields", None) or [str(index) for index in range(len(state))]
    return list(zip(names, state))


def mean_with_error(sums: Tensor, counts: Tensor) -> Difference:
    """Mean of ``sums / counts``, both ``[rows, blocks]``, and its standard error.

    With few rows the blocks are the observations. Correlation of neighboring blocks makes the standard error too
    small. Neighbors are therefore merged repeatedly, and the largest standard error is returned.
    """
    mean = float(sums.sum() / counts.sum())
    if len(sums) >= ROWS:
        return Difference(mean, _error(sums.sum(1), counts.sum(1)))
    errors = [_error(sums, counts)]
    while sums.shape[1] >= 2 * FEWEST_BLOCKS:
        sums, counts = (_merge_neighbors(x) for x in (sums, counts))
        errors.append(_error(sums, counts))
    return Difference(mean, max(errors))


def _error(sums: Tensor, counts: Tensor) -> float:
    """The standard error of ``sums.sum() / counts.sum()``. Each entry is one observation of several tokens."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    n = len(sums)
    if n < 2:
        return math.inf
    deviation = (sums - sums.sum() / counts.sum() * counts).square().sum() * n / (n - 1)
    return float(deviation.sqrt() / counts.sum())


def _merge_neighbors(x: Tensor) -> Tensor:
    """Sums of pairs of neighbors. With an odd number, the last one remains."""
    return torch.nn.functional.pad(x, (0, x.shape[1] % 2)).unflatten(1, (-1, 2)).sum(-1)
