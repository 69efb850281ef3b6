from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from titans_build.registry import RecipeError


def test_accuracy_of_predictors(make: Callable[..., Any]):
    made = make("repeat", 300, period=5, length=32)
    assert made.right(np.roll(made.tokens, 4, axis=1)) == 1.0
    assert not made.counts[:, :4].any() and made.counts[:, 4:].all()
    assert made.task.references() == {"any token": 1 / 16}
    # a pattern comes several times: fewer of its tokens are independent than are counted
    assert abs(made.right(np.array(3)) - 1 / 16) < 0.03


def test_targets_are_the_next_tokens(make: Callable[..., Any]):
    made = make("repeat", 5)
    assert (made.targets[:, 7:-1] == made.tokens[:, 8:]).all()


def test_period_longer_than_the_row(make: Callable[..., Any]):
    with pytest.raises(RecipeError, match="period: expected at most the length 8, got 9"):
        make("repeat", 1, period=9, length=8)
