"""How long a memory keeps what was written into it: the recall of planted pairs by distance.

A random key and value, with the distribution of real keys and values, replace those of one token of the text. They are
written with that token's own step size, momentum and forgetting. Then the memory reads the rest of the text, and is
queried with the key after 0, 1, 2, 4, ... further tokens. A second memory, into which nothing was written at that
token, gives the answer that the key would get without the pair. All other inputs of the memory are those of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...blocks.observers import Learned
from ...blocks.state import map_state
from ...kernels.memory import MemoryState, Tokens, read_memory, titans_memory
from ...kernels.memory.learner import Rule, learn_writes
from ...kernels.memory.learner import read as read_by

PLACES = 4
"""Tokens of the text that are replaced, one at a time."""


class Recall(NamedTuple):
    """Means over all planted pairs, float64 ``[heads, distances]``; ``..._error`` are their standard errors."""

    distances: list[int]
    """Tokens read between the write and the query."""
    cosine: np.ndarray
    """Between the answer and the planted value."""
    cosine_error: np.ndarray
    cosine_without: np.ndarray
    """The same where the pair was never written."""
    relative_error: np.ndarray
    """Norm of answer minus value, relative to the norm of the value."""
    relative_error_without: np.ndarray
    kept: np.ndarray
    """The share of the write's effect on the answer that is left; 1 right after the write."""
    kept_error: np.ndarray
    half_life: list[float | None]
    """Of ``kept``, by head."""


@torch.no_grad()
def recall_of(stretch: Learned, *, longest: int, pairs: int, seed: int = 0) -> Recall:
    """Plant ``pairs`` pairs at each of ``PLACES`` tokens of ``stretch``.

    ``longest``: the largest distance, less than the tokens of the stretch.
    """
    tokens = stretch.tokens
    # a power of two close to the longest distance is left out, as their labels would overlap
    distances = [0, *(2**power for power in range(longest.bit_length()) if 1.4 * 2**power < longest), longest]
    time = tokens.q.shape[1]
    places = sorted({int(place) for place in np.linspace(0, time - longest - 1, PLACES)})
    random = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    memory, at = stretch.before, 0
    for place in places:
        memory, at = _write(stretch, tokens.at(slice(at, place)), memory), place
        k, v = (_random_like(part, pairs, random) for part in (tokens.k, tokens.v))
        here = tokens.at(slice(place, place + 1))
        written = _write(stretch, _expand(here, pairs)._replace(k=k, v=v), _repeat(memory, pairs))
        without = _write(stretch, here._replace(theta=torch.zeros_like(here.theta)), memory)
        found.append(torch.stack(list(_measures(stretch, tokens, place + 1, distances, written, without, k, v))))
    values = torch.cat(found, dim=1).cpu().double()  # [distances, pairs, heads, measures]
    count = values.shape[1]
    mean, error = (part.permute(2, 1, 0).numpy() for part in (values.mean(1), values.std(1) / count**0.5))
    effect, initial = values[..., 4], values[..., 5]
    kept = effect.sum(1) / initial.sum(1)
    residual = effect - kept[:, None] * initial
    kept_error = (residual.square().sum(1) * count / (count - 1)).sqrt() / initial.sum(1)
    return Recall(
        distances,
        cosine=mean[0],
        cosine_error=error[0],
        cosine_without=mean[1],
        relative_error=mean[2],
        relative_error_without=mean[3],
        kept=kept.T.numpy(),
        kept_error=kept_error.T.numpy(),
        half_life=[half_life(distances, head) for head in kept.T.numpy()],
    )


def half_life(distances: list[int], kept: np.ndarray) -> float | None:
    """Tokens until ``kept`` is half of its largest value so far, interpolated; ``None`` where it stays above."""
    if not np.isfinite(kept).all():
        return None  # nothing was written
    halves = np.maximum.accumulate(kept) / 2
    for at in range(1, len(distances)):
        if kept[at] < halves[at]:
            share = (kept[at - 1] - halves[at]) / (kept[at - 1] - kept[at])
            return float(distances[at - 1] + share * (distances[at] - distances[at - 1]))
    return None


def _write(stretch: Learned, tokens: Tokens, memory: MemoryState) -> MemoryState:
    if tokens.q.shape[1] == 0:
        return memory
    options = stretch.options
    if isinstance(options, Rule):
        writes: Any = tokens
        state: Any = learn_writes(options, writes, memory, stretch.norm, None)[1]
        return state
    chunk, activation, clip, read, *_ = options
    return titans_memory(
        *tokens[:6], memory, chunk=chunk, activation=activation, norm=stretch.norm, clip=clip, read=read,
        threshold=options.threshold,
    )[1]  # fmt: skip


def _read(stretch: Learned, keys: Tensor, memory: MemoryState) -> Tensor:
    if isinstance(stretch.options, Rule):
        return read_by(stretch.options, keys, memory, stretch.norm)
    return read_memory(keys, memory.weights, stretch.options.activation, stretch.norm)


def _expand(tokens: Tokens, rows: int) -> Tokens:
    return tokens.map(lambda part: part.expand(rows, *part.shape[1:]))


def _repeat(memory: MemoryState, rows: int) -> MemoryState:
    return map_state(lambda part: part.expand(rows, *part.shape[1:]), memory)


def _random_like(part: Tensor, count: int, random: torch.Generator) -> Tensor:
    """``count`` random vectors [count, 1, heads, width] with the mean, the spread and the norm of those of ``part``."""
    vectors = part[0].cpu().double()  # [time, heads, width]
    drawn = torch.randn(count, 1, *vectors.shape[1:], generator=random, dtype=torch.float64)
    drawn = vectors.mean(0) + drawn * vectors.std(0)
    norm = vectors.norm(dim=-1).mean(0).unsqueeze(-1)
    return (drawn * norm / drawn.norm(dim=-1, keepdim=True)).to(part)


def _measures(
    stretch: Learned,
    tokens: Tokens,
    at: int,
    distances: list[int],
    written: MemoryState,
    without: MemoryState,
    k: Tensor,
    v: Tensor,
) -> Iterator[Tensor]:
    """For each distance ``[pairs, heads, measures]``."""
    pairs = k.shape[0]
    value, size = v[:, 0], v[:, 0].norm(dim=-1)
    initial: Tensor | None = None
    read = 0
    for distance in distances:
        span = tokens.at(slice(at + read, at + distance))
        written, without = _write(stretch, _expand(span, pairs), written), _write(stretch, span, without)
        read = distance
        answer = _read(stretch, k, written)[:, 0]
        # the memory without the pair has one row, which all keys query
        other = _read(stretch, k.transpose(0, 1), without)[0]
        change = answer - other
        initial = change if initial is None else initial
        yield torch.stack(
            [
                cosine_similarity(answer, value, dim=-1),
                cosine_similarity(other, value, dim=-1),
                (answer - value).norm(dim=-1) / size,
                (other - value).norm(dim=-1) / size,
                (change * initial).sum(-1),
                initial.square().sum(-1),
            ],
            dim=-1,
        )
