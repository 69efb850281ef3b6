from __future__ import annotations

import numpy as np
import pytest

from titans_build.tools.randomness import Draws, Permutation, key_of


def draws(rows: int = 100_000, key: int = 1) -> Draws:
    return Draws(key, np.arange(rows))


def excess(counts: np.ndarray) -> float:
    """Pearson's chi-square over what is expected of even counts, in standard deviations."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_numbers_never_change():
    assert key_of("task", 0) == 15207273945522060391
    assert draws(2).integers("x", 3, 100).tolist() == [[38, 35, 7], [15, 50, 22]]
    assert draws(2).distinct("x", 3, 100).tolist() == [[38, 35, 7], [15, 50, 22]]
    assert draws(2).distinct("x", 3, 4).tolist() == [[2, 1, 3], [0, 2, 3]]
    assert Permutation(3, 10)(np.arange(10)).tolist() == [5, 3, 8, 7, 1, 6, 0, 4, 2, 9]


def test_row_is_independent_of_other_rows_and_pieces():
    all_rows, one = draws(10), Draws(1, np.array([7]))
    assert (all_rows.integers("x", 20, 9)[7:8] == one.integers("x", 20, 9)).all()
    assert (all_rows.distinct("x", 5, 100)[7:8] == one.distinct("x", 5, 100)).all()
    pieces = [all_rows.integers("x", 7, 9, start=start) for start in (0, 7, 14)]
    assert (np.hstack(pieces) == all_rows.integers("x", 21, 9)).all()
    assert (all_rows.uniform("x", 5, start=3) == all_rows.uniform("x", 8)[:, 3:]).all()


@pytest.mark.parametrize("high", [2, 3, 10, 1000])
def test_integers_are_uniform_and_independent(high: int):
    numbers = draws().integers("x", 2, high)
    assert numbers.min() == 0 and numbers.max() == high - 1
    assert excess(np.bincount(numbers[:, 0], minlength=high)) < 5
    if high <= 10:  # neighbors have nothing to do with one another, nor have streams and keys
        for other in (numbers[:, 1], draws().integers("y", 1, high)[:, 0], draws(key=2).integers("x", 1, high)[:, 0]):
            assert excess(np.bincount(numbers[:, 0] * high + other, minlength=high**2)) < 5


def test_uniform_range():
    numbers = draws().uniform("x", 1)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert excess(np.bincount((numbers[:, 0] * 100).astype(int), minlength=100)) < 5


@pytest.mark.parametrize("of", [2, 5, 8, 32, 33, 60, 64])
def test_distinct_numbers_are_uniform(of: int):
    numbers = draws().distinct("x", 2, of)
    pairs = np.bincount(numbers[:, 0] * of + numbers[:, 1], minlength=of**2).reshape(of, of)
    assert not np.diagonal(pairs).any()
    assert excess(pairs[~np.eye(of, dtype=bool)]) < 5


@pytest.mark.parametrize("of", [1, 2, 31, 33, 1000, 1025])
def test_permutations(of: int):
    assert (np.sort(draws(5).distinct("x", of, of)) == np.arange(of)).all()
    assert (np.sort(Permutation(4, of)(np.arange(of))) == np.arange(of)).all()


def test_distinct_of_too_few():
    with pytest.raises(ValueError, match="expected at most 4 different numbers, got 5"):
        draws(1).distinct("x", 5, 4)


def test_large_permutation():
    places = np.array([0, 1, 10**10 - 1])
    numbers = Permutation(1, 10**10)(places)
    assert len(set(numbers.tolist())) == 3 and (numbers < 10**10).all() and (numbers >= 0).all()
    assert (numbers != Permutation(2, 10**10)(places)).all()
