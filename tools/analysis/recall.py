"""How long a memory can be asked for what was written into it: recall of planted pairs against distance.

A random key and value, as real keys and values are distributed, take the place of one token of the text: they are
written with that token's own step size, momentum and forgetting. Then the memory goes on reading the text, and is asked
for the key after 0, 1, 2, 4, ... further tokens. Beside it runs the memory into which nothing was written at that
token: what it answers is what the key would have got anyhow. All else, the inputs of the block among it, is the text's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...blocks.state import map_state
from ...kernels.memory import MemoryState, Tokens, read_memory, titans_memory
from .seeing import Stretch

PLACES = 4
"""Tokens of the text whose place pairs take, each in its turn."""


class Recall(NamedTuple):
    """Means over all planted pairs, float64 ``[heads, distances]``; ``..._error`` are their standard errors."""

    distances: list[int]
    """Tokens read between the write and the question."""
    cosine: np.ndarray
    """Between the answer and the planted value."""
    cosine_error: np.ndarray
    cosine_without: np.ndarray
    """The same where it was never written."""
    relative_error: np.ndarray
    """Norm of answer minus value over that of the value."""
    relative_error_without: np.ndarray
    kept: np.ndarray
    """The share that is left of what the write did to the answer, 1 right after it."""
    kept_error: np.ndarray


@torch.no_grad()
def recall_of(stretch: Stretch, *, longest: int, pairs: int, seed: int = 0) -> Recall:
    """Plant ``pairs`` pairs at each of a few places of ``stretch``.

    ``longest``: the largest distance, less than the tokens of the stretch.
    """
    tokens = stretch.tokens
    # apart enough for their names to stand side by side under a figure
    distances = [0, *(2**power for power in range(longest.bit_length()) if 1.4 * 2**power < longest), longest]
    time = tokens.q.shape[1]
    places = sorted({int(place) for place in np.linspace(0, time - longest - 1, PLACES)})
    random = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    memory, at = stretch.before, 0
    for place in places:
        memory, at = _learn(stretch, tokens.at(slice(at, place)), memory), place
        k, v = (_like(part, pairs, random) for part in (tokens.k, tokens.v))
        here = tokens.at(slice(place, place + 1))
        written = _learn(stretch, _rows(here, pairs)._replace(k=k, v=v), _repeat(memory, pairs))
        without = _learn(stretch, here._replace(theta=torch.zeros_like(here.theta)), memory)
        found.append(torch.stack(list(_asked(stretch, tokens, place + 1, distances, written, without, k, v))))
    values = torch.cat(found, dim=1).cpu().double()  # [distances, pairs, heads, measures]
    many = values.shape[1]
    mean, error = values.mean(1), values.std(1) / many**0.5
    effect, first = values[..., 4], values[..., 5]
    ratio = effect.sum(1) / first.sum(1)
    ratio_error = ((effect - ratio[:, None] * first).square().sum(1) * many / (many - 1)).sqrt() / first.sum(1)
    table = [mean[..., 0], error[..., 0], *(mean[..., index] for index in (1, 2, 3)), ratio, ratio_error]
    return Recall(distances, *(part.T.numpy() for part in table))


def _learn(stretch: Stretch, tokens: Tokens, memory: MemoryState) -> MemoryState:
    if tokens.q.shape[1] == 0:
        return memory
    chunk, activation, clip, read, *_ = options = stretch.options
    return titans_memory(
        *tokens, memory, chunk=chunk, activation=activation, norm=stretch.norm, clip=clip, read=read,
        threshold=options.threshold,
    )[1]  # fmt: skip


def _answer(stretch: Stretch, keys: Tensor, memory: MemoryState) -> Tensor:
    return read_memory(keys, memory.weights, stretch.options.activation, stretch.norm)


def _rows(tokens: Tokens, rows: int) -> Tokens:
    return tokens.map(lambda part: part.expand(rows, *part.shape[1:]))


def _repeat(memory: MemoryState, rows: int) -> MemoryState:
    return map_state(lambda part: part.expand(rows, *part.shape[1:]), memory)


def _like(part: Tensor, many: int, random: torch.Generator) -> Tensor:
    """``many`` random vectors [many, 1, heads, width] of the mean, the spread and the norm of those of ``part``."""
    vectors = part[0].cpu().double()  # [time, heads, width]
    drawn = torch.randn(many, 1, *vectors.shape[1:], generator=random, dtype=torch.float64)
    drawn = vectors.mean(0) + drawn * vectors.std(0)
    norm = vectors.norm(dim=-1).mean(0).unsqueeze(-1)
    return (drawn * norm / drawn.norm(dim=-1, keepdim=True)).to(part)


def _asked(
    stretch: Stretch,
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
    first: Tensor | None = None
    read = 0
    for distance in distances:
        span = tokens.at(slice(at + read, at + distance))
        if distance > read:
            written, without = _learn(stretch, _rows(span, pairs), written), _learn(stretch, span, without)
            read = distance
        answer = _answer(stretch, k, written)[:, 0]
        # every key is a question of the one row that nothing was written into
        bare = _answer(stretch, k.transpose(0, 1), without)[0]
        value, change = v[:, 0], answer - bare
        first = change if first is None else first
        size = value.norm(dim=-1)
        yield torch.stack(
            [
                cosine_similarity(answer, value, dim=-1),
                cosine_similarity(bare, value, dim=-1),
                (answer - value).norm(dim=-1) / size,
                (bare - value).norm(dim=-1) / size,
                (change * first).sum(-1),
                first.square().sum(-1),
            ],
            dim=-1,
        )
