"""Recall of planted pairs, against its value by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from titans_build.blocks.observers import Learned
from titans_build.kernels.memory import MemoryState, Options, Tokens
from titans_build.tools.analysis.recall import half_life, recall_of


def stretch(*, alpha: float, theta: float, eta: float | None = None, time: int = 41) -> Learned:
    """A linear memory of two heads with zero initial weights and the same forgetting at every token."""
    random = torch.Generator().manual_seed(0)
    draw = lambda: torch.nn.functional.normalize(torch.randn(1, time, 2, 6, generator=random), dim=-1)  # noqa: E731
    full = lambda value: torch.full((1, time, 2), value)  # noqa: E731
    tokens = Tokens(draw(), draw(), 3 * draw(), full(theta), None if eta is None else full(eta), full(alpha))
    before = MemoryState.fresh((torch.zeros(1, 2, 6, 6),), () if eta is None else None)
    return Learned(tokens, before, None, None, Options(1, "identity", None, "after"), None)


def test_an_empty_memory_answers_a_planted_key_exactly() -> None:
    given = stretch(alpha=0.0, theta=0.5)
    # nothing was written before the first token; a step of 1/2 then reaches the value exactly
    one = given._replace(tokens=given.tokens.at(slice(0, 6)))
    recall = recall_of(one, longest=5, pairs=4)
    # 4 is left out, as its label would overlap that of 5
    assert recall.distances == [0, 1, 2, 5]
    first = recall_of(given._replace(tokens=given.tokens.at(slice(0, 2))), longest=1, pairs=4)
    assert np.allclose(first.cosine[:, 0], 1, atol=1e-5) and np.allclose(first.relative_error[:, 0], 0, atol=1e-5)
    assert np.allclose(first.relative_error_without[:, 0], 1, atol=1e-5)
    assert np.allclose(recall.kept[:, 0], 1) and np.allclose(recall.kept_error[:, 0], 0, atol=1e-6)


def test_a_pair_is_forgotten_at_the_rate_alpha() -> None:
    given = stretch(alpha=0.1, theta=0.5)
    # nothing is written after the pair, so only forgetting acts
    theta = given.tokens.theta.clone()
    theta[:, 1:] = 0
    quiet = given._replace(tokens=given.tokens._replace(theta=theta))
    recall = recall_of(quiet._replace(tokens=quiet.tokens.at(slice(0, 33))), longest=32, pairs=3)
    expected = 0.9 ** np.array(recall.distances)
    assert np.allclose(recall.kept, np.broadcast_to(expected, (2, len(expected))), atol=1e-5)
    life = half_life(recall.distances, recall.kept[0])
    assert life is not None and life == pytest.approx(math.log(0.5) / math.log(0.9), rel=0.1)


def test_momentum_continues_a_write() -> None:
    given = stretch(alpha=0.0, theta=0.1, eta=0.5)
    theta = given.tokens.theta.clone()
    theta[:, 1:] = 0
    recall = recall_of(given._replace(tokens=given.tokens._replace(theta=theta).at(slice(0, 9))), longest=8, pairs=3)
    expected = [sum(0.5**t for t in range(distance + 1)) for distance in recall.distances]
    assert np.allclose(recall.kept, np.broadcast_to(expected, recall.kept.shape), atol=1e-4)


def test_other_tokens_write_over_a_pair_and_the_seed_decides_the_pairs() -> None:
    given = stretch(alpha=0.0, theta=0.5)
    one, same, other = (recall_of(given, longest=32, pairs=6, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.cosine, same.cosine) and not np.array_equal(one.cosine, other.cosine)
    assert (one.cosine[:, 0] > 0.99).all() and (one.cosine[:, -1] < 0.9).all()
    # the memory that was never told knows nothing of it at any distance
    assert (abs(one.cosine_without) < 0.5).all()
    assert (one.kept[:, -1] < 0.7).all()
