from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from titans_build.registry import RecipeError

FORMS = [{}, {"motif": 3}, {"vocab": 32, "noise": 0.2}, {"vocab": 24, "noise": 0.3, "noise_vocab": 8, "motif": 2}]


def perfect(keys: int, values: int) -> Callable[[list[int]], int]:
    """Reads pairs, passing over noise; takes the key or value it stands in for one that ends, or goes on, as needed."""

    def predict(seen: list[int]) -> int:
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        key: tuple[int, ...] = ()
        value: tuple[int, ...] = ()
        for token in seen:
            if token < keys:
                if value:
                    known[key] = value
                    key, value = (), ()
                key += (token,)
            elif token < keys + values:
                value += (token,)
        return known[key][len(value)]

    return predict


@pytest.mark.parametrize("fields", FORMS)
def test_accuracy_of_predictors(make: Callable[..., Any], fields: dict[str, Any]):
    made = make("recall", 150, **fields)
    task = made.task
    assert made.tokens.shape == (150, 128) and made.tokens.max() == task.vocab - 1 and made.tokens.min() == 0
    assert made.by(perfect(task.keys, task.values)) == 1.0
    assert task.references() == {"any value": 1 / task.values}
    rng = np.random.default_rng(0)
    guess = task.keys + rng.integers(0, task.values, made.tokens.shape)
    assert abs(made.right(guess) - 1 / task.values) < made.slack()


def test_targets_are_the_next_tokens(make: Callable[..., Any]):
    for fields in FORMS:
        made = make("recall", 50, **fields)
        inside = made.counts[:, :-1]
        assert (made.targets[:, :-1][inside] == made.tokens[:, 1:][inside]).all()


def test_repeated_keys_are_targets(make: Callable[..., Any]):
    made = make("recall", 50)
    keys = made.tokens[:, ::2]
    for row in range(50):
        for place, key in enumerate(keys[row]):
            assert made.counts[row, 2 * place] == (key in keys[row, :place])
    assert not made.counts[:, 1::2].any()


def test_share_of_noise(make: Callable[..., Any]):
    for fields in FORMS[2:]:
        made = make("recall", 400, **fields)
        noise = made.tokens >= made.task.vocab - made.task.noise_vocab
        assert abs(noise.mean() - made.task.noise) < 0.01


def test_no_position_predicts_the_value(make: Callable[..., Any]):
    # the pair asked for is another key's, or by one chance in eight that of the same one
    made = make("recall", 3000)
    late = make("recall", 3000)
    late.counts[:, :-2] = False
    assert late.best_position() < 1 / 8 + 7 / 8 / 8 + late.slack()
    assert made.right(np.roll(made.tokens, 1, axis=1)) < 1 / 4


def test_each_row_draws_its_values(make: Callable[..., Any]):
    made = make("recall", 4000)
    first = made.tokens[:, 0] == 3
    counts = np.bincount(made.tokens[first, 1] - 8, minlength=8)
    assert (np.abs(counts / first.sum() - 1 / 8) < 4 * np.sqrt(1 / 8 / first.sum())).all()


def test_invalid_fields(make: Callable[..., Any]):
    with pytest.raises(RecipeError, match="noise_vocab: 16 tokens of noise leave 0 of the vocab of 16"):
        make("recall", 1, noise=0.2)
