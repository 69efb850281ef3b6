"""Bins, planted pairs, half lives: against what they are by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from titans_build.kernels.memory import MemoryState, Options, Tokens
from titans_build.tools.analysis.analysis import half_life, labels
from titans_build.tools.analysis.pooling import FEWEST, MOST, Pool, bin_width
from titans_build.tools.analysis.recall import recall_of
from titans_build.tools.analysis.rounding import rounded
from titans_build.tools.analysis.seeing import Stretch


@pytest.mark.parametrize("width", [1, 3, 7, 50])
def test_a_bin_has_the_mean_and_the_maximum_of_its_tokens(width: int) -> None:
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    values[3:9, 1] = torch.nan
    pool = Pool(4, 50, width)
    for part in values.split([1, 20, 0, 4, 25]):
        pool.add(part)
    for index, part in enumerate(values.split(width)):
        for head in range(4):
            real = part[:, head][~part[:, head].isnan()]
            if len(real) == 0:
                assert math.isnan(pool.mean[head, index]) and math.isnan(pool.max[head, index])
                continue
            assert pool.mean[head, index] == pytest.approx(float(real.mean()), rel=1e-5, abs=1e-6)
            assert pool.max[head, index] == pytest.approx(float(real.max()))
    assert pool.mean.shape == (4, math.ceil(50 / width))


@pytest.mark.parametrize("rows", [5, 80, 400, 6000])
@pytest.mark.parametrize("time", [100, 4096, 100_000, 2_000_000])
def test_bins_are_bounded_however_long_the_text(rows: int, time: int) -> None:
    width = bin_width(time, rows)
    bins = math.ceil(time / width)
    assert bins <= MOST
    assert bins >= min(time, FEWEST) / 2
    if time <= FEWEST:
        assert width == 1


def stretch(*, alpha: float, theta: float, eta: float | None = None, time: int = 41) -> Stretch:
    """A linear memory of two heads that begins empty, and forgets the same share at every token."""
    random = torch.Generator().manual_seed(0)
    draw = lambda: torch.nn.functional.normalize(torch.randn(1, time, 2, 6, generator=random), dim=-1)  # noqa: E731
    full = lambda value: torch.full((1, time, 2), value)  # noqa: E731
    tokens = Tokens(draw(), draw(), 3 * draw(), full(theta), None if eta is None else full(eta), full(alpha))
    before = MemoryState.fresh((torch.zeros(1, 2, 6, 6),), () if eta is None else None)
    return Stretch(tokens, before, None, Options(1, "identity", None, "after"))


def test_an_empty_memory_answers_a_planted_key_exactly() -> None:
    given = stretch(alpha=0.0, theta=0.5)
    # at the first token nothing else was written yet; the step of 1/2 then goes all the way to the value
    one = given._replace(tokens=given.tokens.at(slice(0, 6)))
    recall = recall_of(one, longest=5, pairs=4)
    # 4 is left out: its name would stand in that of 5
    assert recall.distances == [0, 1, 2, 5]
    first = recall_of(given._replace(tokens=given.tokens.at(slice(0, 2))), longest=1, pairs=4)
    assert np.allclose(first.cosine[:, 0], 1, atol=1e-5) and np.allclose(first.relative_error[:, 0], 0, atol=1e-5)
    assert np.allclose(first.relative_error_without[:, 0], 1, atol=1e-5)
    assert np.allclose(recall.kept[:, 0], 1) and np.allclose(recall.kept_error[:, 0], 0, atol=1e-6)


def test_what_is_forgotten_goes_at_the_rate_of_alpha() -> None:
    given = stretch(alpha=0.1, theta=0.5)
    # from the write on nothing more is written, so that nothing but forgetting acts
    theta = given.tokens.theta.clone()
    theta[:, 1:] = 0
    quiet = given._replace(tokens=given.tokens._replace(theta=theta))
    recall = recall_of(quiet._replace(tokens=quiet.tokens.at(slice(0, 33))), longest=32, pairs=3)
    expected = 0.9 ** np.array(recall.distances)
    assert np.allclose(recall.kept, np.broadcast_to(expected, (2, len(expected))), atol=1e-5)
    life = half_life(recall.distances, recall.kept[0])
    assert life is not None and life == pytest.approx(math.log(0.5) / math.log(0.9), rel=0.1)


def test_momentum_goes_on_writing() -> None:
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


def test_half_lives() -> None:
    assert half_life([0, 1, 2, 4], np.array([1, 0.75, 0.5, 0.25])) == pytest.approx(2.0)
    assert half_life([0, 10, 20], np.array([1, 3, 0])) == pytest.approx(15.0)  # of the largest, after it
    # a head whose answers swing has lost the pair when it first does
    assert half_life([0, 1, 2, 4], np.array([1, 0.0, -6, 7])) == pytest.approx(0.5)
    assert half_life([0, 1, 2], np.array([1, 0.9, 0.8])) is None
    assert half_life([0, 1], np.array([np.nan, np.nan])) is None


def test_places_are_named_by_their_layer_where_that_is_enough() -> None:
    names = ["layers.0.blocks.0.memory", "layers.1.blocks.0", "layers.1.blocks.1.memory"]
    assert labels(names) == ["layer 0", "layer 1, 1 of 2", "layer 1, 2 of 2"]


def test_numbers_are_plain_json() -> None:
    given = {"a": np.array([[1.23456789, np.nan]], dtype=np.float32), "b": (math.inf, 3), "c": "text", "d": None}
    assert rounded(given) == {"a": [[1.2346, None]], "b": [None, 3], "c": "text", "d": None}
