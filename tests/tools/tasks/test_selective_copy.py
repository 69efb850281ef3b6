from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from titans_build.registry import RecipeError


def test_accuracy_of_predictors(make: Callable[..., Any]):
    made = make("selective_copy", 500)
    blank, marker = 14, 15

    def perfect(seen: list[int]) -> int:
        return [token for token in seen if token < blank][seen.count(marker) - 1]

    assert made.by(perfect) == 1.0
    assert (made.tokens[:, 240:] == marker).all() and (made.tokens[:, :240] != marker).all()
    assert ((made.tokens < blank).sum(1) == 16).all()
    assert made.task.references() == {"any token that is copied": 1 / 14}
    assert all(abs(made.right(np.array(token)) - 1 / 14) < made.slack() for token in range(14))


def test_position_does_not_predict_the_copied_token(make: Callable[..., Any]):
    made = make("selective_copy", 1000)
    # the first place that is ever filled may be the first token; no place can be more than that
    assert made.best_position() < 1 / 14
    filled = (made.tokens[:, :240] < 14).mean(0)
    assert (np.abs(filled - 16 / 240) < 5 * np.sqrt(16 / 240 / 1000)).all()


def test_invalid_fields(make: Callable[..., Any]):
    with pytest.raises(RecipeError, match="copied: 9 tokens and their copies need a length of at least 18, got 17"):
        make("selective_copy", 1, copied=9, length=17)
