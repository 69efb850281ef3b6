from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def test_copy_rows(make: Callable[..., Any]):
    made = make("copy", 50)
    assert made.tokens.shape == made.targets.shape == (50, 96)
    assert (made.tokens[:, 48] == 0).all()
    assert set(np.delete(made.tokens, 48, axis=1).ravel().tolist()) == set(range(1, 10))
    assert (made.tokens[:, :47] == made.tokens[:, 49:]).all()
    assert (made.targets[:, 48:] == made.tokens[:, :48]).all()
    assert not made.counts[:, :48].any()


def test_accuracy_of_predictors(make: Callable[..., Any]):
    made = make("copy", 400)
    assert made.right(np.roll(made.tokens, 48, axis=1)) == 1.0
    (chance,) = made.task.references().values()
    assert chance == 1 / 9
    assert all(abs(made.right(np.array(token)) - chance) < made.slack() for token in range(1, 10))


def test_patterns_are_random(make: Callable[..., Any]):
    made = make("copy", 2000)
    # the token before, or the one at any distance but the right one, says nothing about the next
    for distance in (0, 1, 5, 46, 47):
        assert abs(made.right(np.roll(made.tokens, distance, axis=1)) - 1 / 9) < made.slack() + 0.003
