"""What is seen piece by piece is what one pass shows, and the model computes what it computes otherwise."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import titans_build as tb
from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.live_or_frozen import memories_of
from titans_build.blocks.state import detach
from titans_build.tools.analysis import pooling
from titans_build.tools.analysis.seeing import APART, PEAKS, QUANTITIES, Seen, see

RECIPE = """
version: 1
dim: 16
vocab: 20
layers:
  mac:
    - type: context
      segment: 16
      persistent: 2
      memory: {type: memory, heads: 2, expansion: 2, chunk: 4}
      attend: {type: attention, heads: 2}
  mag: [{type: gate, branches: [{type: attention, window: 8}, {type: memory, heads: 4, expansion: 2, chunk: 4}]}]
stack: [mac, mag]
"""
MEMORIES = {"layers.0.blocks.0.memory": 2, "layers.1.blocks.0.branches.1": 4}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tb.build(tb.load_recipe(RECIPE), seed=0)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(20, (1, 150), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def seen(model: LanguageModel, tokens: Tensor) -> Seen:
    return see(model, tokens, MEMORIES, piece=20, stretch=(40, 100))


def test_records_are_those_of_one_pass(model: LanguageModel, tokens: Tensor, seen: Seen) -> None:
    with tb.observe(model) as whole, torch.no_grad():
        model(tokens)
    assert seen.width == 1 and seen.tokens.keys() == MEMORIES.keys() == whole.memories.keys()
    for name, heads in MEMORIES.items():
        for quantity in QUANTITIES:
            expected = getattr(whole.memories[name], quantity)[0].T.numpy()
            assert expected.shape == (heads, 150)
            assert np.allclose(seen.tokens[name][quantity].mean, expected, rtol=1e-3, atol=1e-5), quantity
    assert seen.gates.keys() == {"layers.0.blocks.0", "layers.1.blocks.0"}
    for name, pool in seen.gates.items():
        record = whole.gates[name]
        expected = torch.stack([record.gate[0], record.first[0], record.second[0]]).numpy()
        assert np.allclose(pool.mean, expected, rtol=1e-3, atol=1e-5)


def test_longer_texts_are_pooled_with_their_maximum(
    model: LanguageModel, tokens: Tensor, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "CELLS", 0)
    monkeypatch.setattr(pooling, "FEWEST", 30)
    pooled = see(model, tokens, MEMORIES, piece=64, stretch=(0, 64))
    assert pooled.width == 5
    for name in MEMORIES:
        alone = seen.tokens[name]["surprise"].mean.reshape(-1, 30, 5)
        assert np.allclose(pooled.tokens[name]["surprise"].max, alone.max(-1), rtol=1e-3)
        assert np.allclose(pooled.tokens[name]["surprise"].mean, alone.mean(-1), rtol=1e-3)


def test_drift_is_measured_on_the_weights_themselves(model: LanguageModel, tokens: Tensor, seen: Seen) -> None:
    with torch.no_grad():
        fresh, state = memories_of(detach(model.init_state(1))), memories_of(model(tokens).state)
    for name, first, last in zip(MEMORIES, fresh, state):
        drift = seen.drift[name]
        assert drift.positions == [0, 20, 40, 60, 80, 100, 120, 140, 150]
        for head in range(MEMORIES[name]):
            norm = lambda parts, head=head: math.sqrt(sum(float(p[0, head].square().sum()) for p in parts))  # noqa: E731
            moved = norm([now - then for now, then in zip(last.weights, first.weights)])
            assert drift.norm[head, -1] == pytest.approx(norm(last.weights), rel=1e-4)
            assert drift.distance[head, -1] == pytest.approx(moved / norm(first.weights), rel=1e-3)
            assert drift.distance[head, 0] == 0


def test_a_stretch_goes_on_from_where_it_begins(model: LanguageModel, tokens: Tensor, seen: Seen) -> None:
    with torch.no_grad():
        state = memories_of(model(tokens[:, :40]).state)
    for (name, heads), before in zip(MEMORIES.items(), state):
        kept = seen.stretches[name]
        assert kept.tokens.k.shape[:3] == (1, 60, heads) == kept.tokens.theta.shape
        assert kept.options.chunk == 4
        for mine, theirs in zip(kept.before.weights, before.weights):
            assert torch.allclose(mine, theirs, atol=1e-5)


def test_the_most_surprising_tokens_are_named(seen: Seen) -> None:
    surprise = np.concatenate([seen.tokens[name]["surprise"].mean for name in MEMORIES]).mean(0)
    places = [place for place, _ in seen.peaks]
    assert int(surprise.argmax()) in places and places == sorted(places) and len(places) <= PEAKS
    assert all(b - a >= APART for a, b in pairwise(places))
    for place, value in seen.peaks:
        assert value == pytest.approx(float(surprise[place]), rel=1e-3)
