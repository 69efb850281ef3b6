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


def test_the_numbers_are_the_same_on_every_machine():
    assert key_of("task", 0) == 15207273945522060391
    assert draws(2).integers("x", 3, 100).tolist() == [[38, 35, 7], [15, 50, 22]]
    assert draws(2).distinct("x", 3, 100).tolist() == [[38, 35, 7], [15, 50, 22]]
    assert draws(2).distinct("x", 3, 4).tolist() == [[2, 1, 3], [0, 2, 3]]
    assert Permutation(3, 10)(np.arange(10)).tolist() == [5, 3, 8, 7, 1, 6, 0, 4, 2, 9]


def test_a_row_is_the_same_alone_and_among_others_and_in_pieces():
    all_rows, one = draws(10), Draws(1, np.array([7]))
    assert (all_rows.integers("x", 20, 9)[7:8] == one.integers("x", 20, 9)).all()
    assert (all_rows.distinct("x", 5, 100)[7:8] == one.distinct("x", 5, 100)).all()
    pieces = [all_rows.integers("x", 7, 9, start=start) for start in (0, 7, 14)]
    assert (np.hstack(pieces) == all_rows.integers("x", 21, 9)).all()
    assert (all_rows.uniform("x", 5, start=3) == all_rows.uniform("x", 8)[:, 3:]).all()


@pytest.mark.parametrize("high", [2, 3, 10, 1000])
def test_numbers_are_even(high: int):
    numbers = draws().integers("x", 2, high)
    assert numbers.min() == 0 and numbers.max() == high - 1
    assert excess(np.bincount(numbers[:, 0], minlength=high)) < 5
    if high <= 10:  # neighbours have nothing to do with one another, nor have streams and keys
        for other in (numbers[:, 1], draws().integers("y", 1, high)[:, 0], draws(key=2).integers("x", 1, high)[:, 0]):
            assert excess(np.bincount(numbers[:, 0] * high + other, minlength=high**2)) < 5


def test_uniform_numbers_are_from_zero_to_one():
    numbers = draws().uniform("x", 1)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert excess(np.bincount((numbers[:, 0] * 100).astype(int), minlength=100)) < 5


@pytest.mark.parametrize("of", [2, 5, 8, 32, 33, 60, 64])
def test_different_numbers_come_in_every_order_alike(of: int):
    numbers = draws().distinct("x", 2, of)
    pairs = np.bincount(numbers[:, 0] * of + numbers[:, 1], minlength=of**2).reshape(of, of)
    assert not np.diagonal(pairs).any()
    assert excess(pairs[~np.eye(of, dtype=bool)]) < 5


@pytest.mark.parametrize("of", [1, 2, 31, 33, 1000, 1025])
def test_all_of_them_are_a_permutation(of: int):
    assert (np.sort(draws(5).distinct("x", of, of)) == np.arange(of)).all()
    assert (np.sort(Permutation(4, of)(np.arange(of))) == np.arange(of)).all()


def test_too_many_different_numbers():
    with pytest.raises(ValueError, match="expected at most 4 different numbers, got 5"):
        draws(1).distinct("x", 5, 4)


def test_a_permutation_of_more_than_memory_holds():
    places = np.array([0, 1, 10**10 - 1])
    numbers = Permutation(1, 10**10)(places)
    assert len(set(numbers.tolist())) == 3 and (numbers < 10**10).all() and (numbers >= 0).all()
    assert (numbers != Permutation(2, 10**10)(places)).all()
