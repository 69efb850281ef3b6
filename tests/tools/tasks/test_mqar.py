from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from titans_build.registry import RecipeError


@pytest.mark.parametrize(
    ("vocab", "length", "pairs"), [(256, 64, 4), (8192, 64, 4), (8192, 128, 8), (8192, 256, 16), (8192, 512, 64)]
)
def test_published_sizes(make: Callable[..., Any], vocab: int, length: int, pairs: int):
    made = make("mqar", 60, vocab=vocab, length=length, pairs=pairs)
    assert made.tokens.shape == (60, length) and made.tokens.max() < vocab
    assert (made.counts.sum(1) == pairs).all()
    keys, values = made.tokens[:, 0 : 2 * pairs : 2], made.tokens[:, 1 : 2 * pairs : 2]
    assert ((keys > 0) & (keys < vocab // 2)).all() and (values >= vocab // 2).all()
    for drawn in (keys, values):
        assert all(len(set(row)) == pairs for row in drawn.tolist())
    # every key is asked for once, at the start of a place behind the pairs
    rows, times = np.nonzero(made.counts)
    assert (times % 2 == 0).all() and times.min() >= 2 * pairs
    assert (np.sort(made.tokens[rows, times].reshape(60, pairs), 1) == np.sort(keys, 1)).all()
    # with its value, asked for, and nowhere else
    assert ((made.tokens[:, :, None] == keys[:, None]).sum(1) == 2).all()


def test_accuracy_of_predictors(make: Callable[..., Any]):
    made = make("mqar", 1000)
    context = 8

    def perfect(seen: list[int]) -> int:
        return dict(zip(seen[:context:2], seen[1:context:2]))[seen[-1]]

    assert made.by(perfect) == 1.0
    references = made.task.references()
    rng = np.random.default_rng(0)
    simulated = {
        "any value": made.right(128 + rng.integers(0, 128, made.tokens.shape)),
        "any value of the row": made.by(lambda seen: seen[1 + 2 * rng.integers(4)]),
    }
    assert references == {"any value": 1 / 128, "any value of the row": 1 / 4}
    for name, accuracy in references.items():
        assert abs(simulated[name] - accuracy) < made.slack(), name


def test_neither_position_nor_order_predicts_the_value(make: Callable[..., Any]):
    made = make("mqar", 3000)
    assert made.best_position() < 1 / 4 + made.slack()
    # which pair is asked for first, second, ... is chance
    for query in range(4):
        asked = np.array([np.flatnonzero(row)[query] for row in made.counts])
        values = made.targets[np.arange(3000), asked]
        for pair in range(4):
            assert abs((values == made.tokens[:, 1 + 2 * pair]).mean() - 1 / 4) < 2 / np.sqrt(3000)


def test_distribution_of_query_places(make: Callable[..., Any]):
    # one pair: its place has exactly the weights' distribution
    made = make("mqar", 20_000, pairs=1, power=0.01)
    places = (np.nonzero(made.counts)[1] - 2) // 2
    weights = np.arange(1, 32) ** -0.99
    seen, expected = np.bincount(places, minlength=31) / 20_000, weights / weights.sum()
    assert (np.abs(seen - expected) < 4.5 * np.sqrt(expected / 20_000)).all()
    even = make("mqar", 20_000, pairs=1, power=1.0)
    places = (np.nonzero(even.counts)[1] - 2) // 2
    assert (np.abs(np.bincount(places, minlength=31) / 20_000 - 1 / 31) < 4.5 * np.sqrt(1 / 31 / 20_000)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": 17}, "pairs: 17 pairs and their queries need a length of at least 68, got 64"),
        ({"vocab": 8}, "pairs: a vocab of 8 has 3 keys, which are too few for 4 pairs"),
        ({"length": 63}, r"length: expected integer .*multiple of 2.*, got 63"),
        ({"power": 0.0}, "power: expected number > 0 <= 1, got 0.0"),
    ],
)
def test_invalid_fields(make: Callable[..., Any], fields: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        make("mqar", 1, **fields)


def test_as_many_pairs_as_fit(make: Callable[..., Any]):
    made = make("mqar", 20, pairs=16, vocab=34)
    assert (made.counts.sum(1) == 16).all()
    assert made.counts[:, 32::2].all()
