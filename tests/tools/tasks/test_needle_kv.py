from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from titans_build.registry import RecipeError


def perfect(seen: list[int]) -> int:
    """What follows the first time that the key stood there."""
    return seen[seen.index(seen[-1]) + 1]


@pytest.mark.parametrize("fields", [{}, {"queries": 3, "distractors": 5}, {"depth": 0.2, "align": 16}, {"pairs": 16}])
def test_accuracy_of_predictors(make: Callable[..., Any], fields: dict[str, Any]):
    made = make("needle_kv", 1500, **fields)
    pairs, queries = made.fields["pairs"], made.fields["queries"]
    assert made.by(perfect) == 1.0
    assert (made.counts.sum(1) == queries).all()
    references = made.task.references()
    rng = np.random.default_rng(0)

    def any_pair(seen: list[int]) -> int:
        keys = [place for place, token in enumerate(seen[: 256 - made.task.tail]) if token < 16]
        return seen[rng.choice(keys) + 1]

    simulated = {
        "any value": made.right(16 + rng.integers(0, 16, made.tokens.shape)),
        "the value of any pair of the row": made.by(any_pair),
    }
    assert references == {"any value": 1 / 16, "the value of any pair of the row": 1 / pairs + (1 - 1 / pairs) / 16}
    for name, accuracy in references.items():
        assert abs(simulated[name] - accuracy) < made.slack(), name


def test_planted_pairs(make: Callable[..., Any]):
    made = make("needle_kv", 300, queries=2, distractors=3)
    before = made.tokens[:, : -made.task.tail]
    is_key, is_value = before < 16, (before >= 16) & (before < 32)
    assert (is_key.sum(1) == 4).all() and (is_value.sum(1) == 4 + 3).all()
    assert all(len(set(row[row < 16])) == 4 for row in before)
    rows, times = np.nonzero(is_key)
    assert is_value[rows, times + 1].all() and (times % 2 == 0).all()
    # the end: a key, its value, and another key
    assert (made.tokens[:, -3] != made.tokens[:, -1]).all()
    assert (made.tokens[:, -2] == made.targets[:, -3]).all()


def test_neither_position_nor_order_predicts_the_value(make: Callable[..., Any]):
    made = make("needle_kv", 3000, length=32)
    assert made.best_position() < 1 / 4
    # the pair asked for is the first, second, ... of the row alike
    asked = [[*(row[row < 16])].index(row[-1]) for row in made.tokens]
    assert (np.abs(np.bincount(asked, minlength=4) / 3000 - 1 / 4) < 4 * np.sqrt(3 / 16 / 3000)).all()


def test_depth_of_the_queried_pair(make: Callable[..., Any]):
    for depth, align in ((0.0, 2), (0.37, 2), (1.0, 2), (1.0, 32), (0.5, 3)):
        made = make("needle_kv", 50, depth=depth, align=align)
        step = align * -(-2 // align)
        place = step * round(depth * (255 // step - 1))
        assert (made.tokens[:, place] == made.tokens[:, -1]).all()
        assert ((made.tokens[:, :-1] < 16).sum(1) == 4).all()


def test_pieces_equal_the_row(make: Callable[..., Any]):
    made = make("needle_kv", 3, length=4000, queries=3, distractors=9)
    for start in range(0, 4000, 333):
        tokens, targets = made.task.piece(made.draws, start, min(start + 333, 4000))
        assert (tokens == made.tokens[:, start : start + 333]).all()
        assert (targets == made.targets[:, start : start + 333]).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": 17}, "pairs: 16 keys are too few for 17 pairs"),
        ({"queries": 5}, "queries: expected at most 4, the pairs, got 5"),
        (
            {"length": 8},
            "length: expected at least 9, for 4 planted at multiples of 2 and 1 tokens of questions, got 8",
        ),
        ({"depth": 0.5, "queries": 2}, "depth: expected a single query, got 2"),
    ],
)
def test_invalid_fields(make: Callable[..., Any], fields: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        make("needle_kv", 1, **fields)


def test_smallest_length(make: Callable[..., Any]):
    made = make("needle_kv", 20, length=9)
    assert made.by(perfect) == 1.0
