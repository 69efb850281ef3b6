from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from titans_build.registry import RecipeError


def test_copy_rows(make: Callable[..., Any]):
    made = make("copy", 50)
    assert made.tokens.shape == made.targets.shape == (50, 96)
    assert (made.tokens[:, 48] == 0).all()
    assert set(np.delete(made.tokens, 48, axis=1).ravel().tolist()) == set(range(1, 10))
    assert (made.tokens[:, :47] == made.tokens[:, 49:]).all()
    assert (made.targets[:, 48:] == made.tokens[:, :48]).all()
    assert not made.counts[:, :48].any()


def test_copy_accuracy_of_predictors(make: Callable[..., Any]):
    made = make("copy", 400)
    assert made.right(np.roll(made.tokens, 48, axis=1)) == 1.0
    (chance,) = made.task.references().values()
    assert chance == 1 / 9
    assert all(abs(made.right(np.array(token)) - chance) < made.slack() for token in range(1, 10))


def test_copy_patterns_are_random(make: Callable[..., Any]):
    made = make("copy", 2000)
    # the token before, or the one at any distance but the right one, says nothing about the next
    for distance in (0, 1, 5, 46, 47):
        assert abs(made.right(np.roll(made.tokens, distance, axis=1)) - 1 / 9) < made.slack() + 0.003


def test_repeat_accuracy_of_predictors(make: Callable[..., Any]):
    made = make("repeat", 300, period=5, length=32)
    assert made.right(np.roll(made.tokens, 4, axis=1)) == 1.0
    assert not made.counts[:, :4].any() and made.counts[:, 4:].all()
    assert made.task.references() == {"any token": 1 / 16}
    # a pattern comes several times: fewer of its tokens are independent than are counted
    assert abs(made.right(np.array(3)) - 1 / 16) < 0.03


def test_repeat_targets_are_the_next_tokens(make: Callable[..., Any]):
    made = make("repeat", 5)
    assert (made.targets[:, 7:-1] == made.tokens[:, 8:]).all()


def test_repeat_period_longer_than_the_row(make: Callable[..., Any]):
    with pytest.raises(RecipeError, match="period: expected at most the length 8, got 9"):
        make("repeat", 1, period=9, length=8)


def test_selective_copy_accuracy_of_predictors(make: Callable[..., Any]):
    made = make("selective_copy", 500)
    blank, marker = 14, 15

    def perfect(seen: list[int]) -> int:
        return [token for token in seen if token < blank][seen.count(marker) - 1]

    assert made.by(perfect) == 1.0
    assert (made.tokens[:, 240:] == marker).all() and (made.tokens[:, :240] != marker).all()
    assert ((made.tokens < blank).sum(1) == 16).all()
    assert made.task.references() == {"any token that is copied": 1 / 14}
    assert all(abs(made.right(np.array(token)) - 1 / 14) < made.slack() for token in range(14))


def test_selective_copy_position_does_not_predict_the_copied_token(make: Callable[..., Any]):
    made = make("selective_copy", 1000)
    # the first place that is ever filled may be the first token; no place can be more than that
    assert made.best_position() < 1 / 14
    filled = (made.tokens[:, :240] < 14).mean(0)
    assert (np.abs(filled - 16 / 240) < 5 * np.sqrt(16 / 240 / 1000)).all()


def test_selective_copy_invalid_fields(make: Callable[..., Any]):
    with pytest.raises(RecipeError, match="copied: 9 tokens and their copies need a length of at least 18, got 17"):
        make("selective_copy", 1, copied=9, length=17)


def test_compression_accuracy_of_predictors(make: Callable[..., Any]):
    made = make("compression", 300)
    assert made.tokens.shape == (300, 62)
    assert made.by(lambda seen: seen[seen.count(15) - 1]) == 1.0
    assert (made.tokens[:, 31:] == 15).all() and (made.tokens[:, :31] < 15).all()
    assert made.counts[:, 31:].all() and not made.counts[:, :31].any()
    assert made.task.references() == {"any token": 1 / 15}
    assert all(abs(made.right(np.array(token)) - 1 / 15) < made.slack() for token in range(15))
    # the token at a position is the answer to one marker in 31
    assert made.best_position() < 1 / 15 + 1 / 31 + made.slack()
