"""Recording in pieces gives the values of one pass; values are pooled in bins."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import titans_build as tb
from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.memory_ablation import memories_of
from titans_build.blocks.state import detach
from titans_build.tools.analysis import recording
from titans_build.tools.analysis.recording import (
    MAX_BINS,
    MIN_BINS,
    PEAK_DISTANCE,
    PEAKS,
    QUANTITIES,
    Bins,
    Recording,
    bin_width,
    record,
)

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
def recorded(model: LanguageModel, tokens: Tensor) -> Recording:
    return record(model, tokens, MEMORIES, piece=20, stretch=(40, 100))


def test_a_recording_is_that_of_one_pass(model: LanguageModel, tokens: Tensor, recorded: Recording) -> None:
    with tb.observe(model) as whole, torch.no_grad():
        model(tokens)
    assert recorded.bin_width == 1 and recorded.tokens.keys() == MEMORIES.keys() == whole.memories.keys()
    for name, heads in MEMORIES.items():
        for quantity in QUANTITIES:
            expected = getattr(whole.memories[name], quantity)[0].T.numpy()
            assert expected.shape == (heads, 150)
            assert np.allclose(recorded.tokens[name][quantity].mean, expected, rtol=1e-3, atol=1e-5), quantity
    assert recorded.gates.keys() == {"layers.0.blocks.0", "layers.1.blocks.0"}
    for name, pool in recorded.gates.items():
        record = whole.gates[name]
        expected = torch.stack([record.gate[0], record.first[0], record.second[0]]).numpy()
        assert np.allclose(pool.mean, expected, rtol=1e-3, atol=1e-5)


def test_long_texts_are_pooled(
    model: LanguageModel, tokens: Tensor, recorded: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "CELLS", 0)
    monkeypatch.setattr(recording, "MIN_BINS", 30)
    pooled = record(model, tokens, MEMORIES, piece=64, stretch=(0, 64))
    assert pooled.bin_width == 5
    for name in MEMORIES:
        alone = recorded.tokens[name]["surprise"].mean.reshape(-1, 30, 5)
        assert np.allclose(pooled.tokens[name]["surprise"].max, alone.max(-1), rtol=1e-3)
        assert np.allclose(pooled.tokens[name]["surprise"].mean, alone.mean(-1), rtol=1e-3)


def test_drift_is_that_of_the_weights(model: LanguageModel, tokens: Tensor, recorded: Recording) -> None:
    with torch.no_grad():
        fresh, state = memories_of(detach(model.init_state(1))), memories_of(model(tokens).state)
    for name, first, last in zip(MEMORIES, fresh, state):
        drift = recorded.drift[name]
        assert drift.positions == [0, 20, 40, 60, 80, 100, 120, 140, 150]
        for head in range(MEMORIES[name]):
            norm = lambda parts, head=head: math.sqrt(sum(float(p[0, head].square().sum()) for p in parts))  # noqa: E731
            moved = norm([now - then for now, then in zip(last.weights, first.weights)])
            assert drift.norm[head, -1] == pytest.approx(norm(last.weights), rel=1e-4)
            assert drift.distance[head, -1] == pytest.approx(moved / norm(first.weights), rel=1e-3)
            assert drift.distance[head, 0] == 0


def test_a_stretch_starts_from_the_state_before_it(model: LanguageModel, tokens: Tensor, recorded: Recording) -> None:
    with torch.no_grad():
        state = memories_of(model(tokens[:, :40]).state)
    for (name, heads), before in zip(MEMORIES.items(), state):
        kept = recorded.stretches[name]
        assert kept.tokens.k.shape[:3] == (1, 60, heads) == kept.tokens.theta.shape
        assert kept.options.chunk == 4
        for mine, theirs in zip(kept.before.weights, before.weights):
            assert torch.allclose(mine, theirs, atol=1e-5)


def test_peaks_are_the_most_surprising_tokens(recorded: Recording) -> None:
    surprise = np.concatenate([recorded.tokens[name]["surprise"].mean for name in MEMORIES]).mean(0)
    places = [place for place, _ in recorded.peaks]
    assert int(surprise.argmax()) in places and places == sorted(places) and len(places) <= PEAKS
    assert all(b - a >= PEAK_DISTANCE for a, b in pairwise(places))
    for place, value in recorded.peaks:
        assert value == pytest.approx(float(surprise[place]), rel=1e-3)


@pytest.mark.parametrize("width", [1, 3, 7, 50])
def test_bins_hold_mean_and_maximum(width: int) -> None:
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    values[3:9, 1] = torch.nan
    bins = Bins(4, 50, width)
    for part in values.split([1, 20, 0, 4, 25]):
        bins.add(part)
    for index, part in enumerate(values.split(width)):
        for head in range(4):
            real = part[:, head][~part[:, head].isnan()]
            if len(real) == 0:
                assert math.isnan(bins.mean[head, index]) and math.isnan(bins.max[head, index])
                continue
            assert bins.mean[head, index] == pytest.approx(float(real.mean()), rel=1e-5, abs=1e-6)
            assert bins.max[head, index] == pytest.approx(float(real.max()))
    assert bins.mean.shape == (4, math.ceil(50 / width))


@pytest.mark.parametrize("rows", [5, 80, 400, 6000])
@pytest.mark.parametrize("time", [100, 4096, 100_000, 2_000_000])
def test_bins_are_bounded_however_long_the_text(rows: int, time: int) -> None:
    width = bin_width(time, rows)
    bins = math.ceil(time / width)
    assert bins <= MAX_BINS
    assert bins >= min(time, MIN_BINS) / 2
    if time <= MIN_BINS:
        assert width == 1


def test_learners_with_inputs_of_their_own() -> None:
    layers = {
        "m": [{"type": "yaad", "heads": 2}, {"type": "delta_product", "heads": 2}, {"type": "omega_net", "heads": 2}]
    }
    model = tb.build({"version": 1, "dim": 8, "vocab": 20, "layers": layers, "stack": ["m"]}, seed=0)
    tokens = torch.arange(20).unsqueeze(0)
    names = ["layers.0.blocks.0", "layers.0.blocks.2"]  # not the one with two keys for each token
    found = record(model, tokens, dict.fromkeys(names, 2), piece=10, stretch=(0, 20))
    assert {name: stretch.tokens.theta.shape for name, stretch in found.stretches.items()} == dict.fromkeys(
        names, (1, 20, 2)
    )
    assert len(memories_of(model(tokens).state)) == 3
