from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from titans_build.registry import RecipeError


def places(made: Any) -> np.ndarray:
    """[rows] where the needle's marker stands."""
    return (made.tokens == made.task.marker).argmax(1)


def test_needle_accuracy_of_predictors(make: Callable[..., Any]):
    made = make("needle", 1500, width=2)

    def perfect(seen: list[int]) -> int:
        marker = 32
        first, last = seen.index(marker), len(seen) - 1 - seen[::-1].index(marker)
        return seen[first + len(seen) - last]

    assert made.by(perfect) == 1.0
    assert made.counts[:, -2:].all() and not made.counts[:, :-2].any()
    assert (made.targets[:, -2] == made.tokens[:, -1]).all()
    assert made.task.references() == {"any value": 1 / 16}
    assert all(abs(made.right(np.array(value)) - 1 / 16) < made.slack() for value in range(16))


def test_needle_noise_reveals_nothing(make: Callable[..., Any]):
    made = make("needle", 300)
    assert ((made.tokens < 16).sum(1) == 1).all()
    assert ((made.tokens == 32).sum(1) == 2).all() and (made.tokens[:, -1] == 32).all()
    assert made.best_position() < 1 / 16
    # neither the noise beside it nor where it is says what it is
    at = places(made)
    before = made.tokens[np.arange(300), np.maximum(at - 1, 0)]
    assert abs(np.corrcoef(before, made.targets[:, -1])[0, 1]) < 0.25
    assert abs(np.corrcoef(at, made.targets[:, -1])[0, 1]) < 0.25


@pytest.mark.parametrize("align", [1, 16])
def test_needle_depth_and_alignment(make: Callable[..., Any], align: int):
    made = make("needle", 4000, align=align)
    at = places(made)
    slots = (256 - 1 - 2) // align + 1
    assert made.task.slots == slots
    assert (at % align == 0).all() and at.min() == 0 and at.max() == (slots - 1) * align
    assert abs(at.mean() / at.max() - 0.5) < 4 * np.sqrt(1 / 12 / 4000) * 1.2
    for depth, place in ((0, 0), (0.5, round(0.5 * (slots - 1)) * align), (1, (slots - 1) * align)):
        assert (places(make("needle", 5, align=align, depth=float(depth))) == place).all()


def test_needle_ask_place(make: Callable[..., Any]):
    made = make("needle", 2000, ask="place", length=67, values=4)
    at, slots = places(made), 65
    assert (made.targets[:, -1] == at * 4 // slots).all()
    (best,) = made.task.references().values()
    assert best == 17 / 65
    simulated = max(made.right(np.array(part)) for part in range(4))
    assert abs(simulated - best) < made.slack()
    # what was planted has nothing to do with it
    planted = made.tokens[np.arange(2000), at + 1]
    assert abs((planted == made.targets[:, -1]).mean() - 1 / 4) < made.slack()


def test_needle_pieces_equal_the_row(make: Callable[..., Any]):
    made = make("needle", 2, length=5000, width=3)
    for size in (1, 999, 5000):
        if size == 1:
            spans = [(start, start + 1) for start in [*range(0, 5000, 97), *range(4990, 5000)]]
        else:
            spans = [(start, min(start + size, 5000)) for start in range(0, 5000, size)]
        for start, stop in spans:
            tokens, targets = made.task.piece(made.draws, start, stop)
            assert (tokens == made.tokens[:, start:stop]).all()
            assert (targets == made.targets[:, start:stop]).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 6, "width": 3}, "length: 6 tokens have no room for a value of 3 and the question"),
        ({"ask": "place", "depth": 0.5}, "depth: the place cannot be asked for"),
        ({"ask": "place", "length": 18}, "values: expected at most 16, the possible places of a needle, got 17"),
        ({"ask": "plaice"}, "ask: expected 'value' or 'place', got 'plaice'; did you mean 'place'"),
        ({"depth": 1.5}, "depth: expected number from 0 to 1 or null, got 1.5"),
    ],
)
def test_needle_invalid_fields(make: Callable[..., Any], fields: dict[str, Any], message: str):
    values = {"values": 17} if fields.get("length") == 18 else {}
    with pytest.raises(RecipeError, match=message):
        make("needle", 1, **fields, **values)


def test_needle_smallest_length(make: Callable[..., Any]):
    made = make("needle", 3, length=7, width=3)
    assert (made.tokens[:, 0] == made.task.marker).all() and (made.tokens[:, 4] == made.task.marker).all()
    assert (made.targets[:, 4:] == made.tokens[:, 1:4]).all()


def perfect(seen: list[int]) -> int:
    """What follows the first time that the key stood there."""
    return seen[seen.index(seen[-1]) + 1]


@pytest.mark.parametrize("fields", [{}, {"queries": 3, "distractors": 5}, {"depth": 0.2, "align": 16}, {"pairs": 16}])
def test_needle_kv_accuracy_of_predictors(make: Callable[..., Any], fields: dict[str, Any]):
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


def test_needle_kv_planted_pairs(make: Callable[..., Any]):
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


def test_needle_kv_neither_position_nor_order_predicts_the_value(make: Callable[..., Any]):
    made = make("needle_kv", 3000, length=32)
    assert made.best_position() < 1 / 4
    # the pair asked for is the first, second, ... of the row alike
    asked = [[*(row[row < 16])].index(row[-1]) for row in made.tokens]
    assert (np.abs(np.bincount(asked, minlength=4) / 3000 - 1 / 4) < 4 * np.sqrt(3 / 16 / 3000)).all()


def test_needle_kv_depth_of_the_queried_pair(make: Callable[..., Any]):
    for depth, align in ((0.0, 2), (0.37, 2), (1.0, 2), (1.0, 32), (0.5, 3)):
        made = make("needle_kv", 50, depth=depth, align=align)
        step = align * -(-2 // align)
        place = step * round(depth * (255 // step - 1))
        assert (made.tokens[:, place] == made.tokens[:, -1]).all()
        assert ((made.tokens[:, :-1] < 16).sum(1) == 4).all()


def test_needle_kv_pieces_equal_the_row(make: Callable[..., Any]):
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
def test_needle_kv_invalid_fields(make: Callable[..., Any], fields: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        make("needle_kv", 1, **fields)


def test_needle_kv_smallest_length(make: Callable[..., Any]):
    made = make("needle_kv", 20, length=9)
    assert made.by(perfect) == 1.0
