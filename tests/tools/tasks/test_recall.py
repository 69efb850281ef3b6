from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import titans_build as tb
from titans_build.registry import RecipeError


@pytest.mark.parametrize(
    ("vocab", "length", "pairs"), [(256, 64, 4), (8192, 64, 4), (8192, 128, 8), (8192, 256, 16), (8192, 512, 64)]
)
def test_mqar_published_sizes(make: Callable[..., Any], vocab: int, length: int, pairs: int):
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


def test_mqar_accuracy_of_predictors(make: Callable[..., Any]):
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


def test_mqar_neither_position_nor_order_predicts_the_value(make: Callable[..., Any]):
    made = make("mqar", 3000)
    assert made.best_position() < 1 / 4 + made.slack()
    # which pair is asked for first, second, ... is chance
    for query in range(4):
        asked = np.array([np.flatnonzero(row)[query] for row in made.counts])
        values = made.targets[np.arange(3000), asked]
        for pair in range(4):
            assert abs((values == made.tokens[:, 1 + 2 * pair]).mean() - 1 / 4) < 2 / np.sqrt(3000)


def test_mqar_distribution_of_query_places(make: Callable[..., Any]):
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
def test_mqar_invalid_fields(make: Callable[..., Any], fields: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        make("mqar", 1, **fields)


def test_mqar_as_many_pairs_as_fit(make: Callable[..., Any]):
    made = make("mqar", 20, pairs=16, vocab=34)
    assert (made.counts.sum(1) == 16).all()
    assert made.counts[:, 32::2].all()


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
def test_recall_accuracy_of_predictors(make: Callable[..., Any], fields: dict[str, Any]):
    made = make("recall", 150, **fields)
    task = made.task
    assert made.tokens.shape == (150, 128) and made.tokens.max() == task.vocab - 1 and made.tokens.min() == 0
    assert made.by(perfect(task.keys, task.values)) == 1.0
    assert task.references() == {"any value": 1 / task.values}
    rng = np.random.default_rng(0)
    guess = task.keys + rng.integers(0, task.values, made.tokens.shape)
    assert abs(made.right(guess) - 1 / task.values) < made.slack()


def test_recall_targets_are_the_next_tokens(make: Callable[..., Any]):
    for fields in FORMS:
        made = make("recall", 50, **fields)
        inside = made.counts[:, :-1]
        assert (made.targets[:, :-1][inside] == made.tokens[:, 1:][inside]).all()


def test_recall_repeated_keys_are_targets(make: Callable[..., Any]):
    made = make("recall", 50)
    keys = made.tokens[:, ::2]
    for row in range(50):
        for place, key in enumerate(keys[row]):
            assert made.counts[row, 2 * place] == (key in keys[row, :place])
    assert not made.counts[:, 1::2].any()


def test_recall_share_of_noise(make: Callable[..., Any]):
    for fields in FORMS[2:]:
        made = make("recall", 400, **fields)
        noise = made.tokens >= made.task.vocab - made.task.noise_vocab
        assert abs(noise.mean() - made.task.noise) < 0.01


def test_recall_no_position_predicts_the_value(make: Callable[..., Any]):
    # the pair asked for is another key's, or by one chance in eight that of the same one
    made = make("recall", 3000)
    late = make("recall", 3000)
    late.counts[:, :-2] = False
    assert late.best_position() < 1 / 8 + 7 / 8 / 8 + late.slack()
    assert made.right(np.roll(made.tokens, 1, axis=1)) < 1 / 4


def test_recall_each_row_draws_its_values(make: Callable[..., Any]):
    made = make("recall", 4000)
    first = made.tokens[:, 0] == 3
    counts = np.bincount(made.tokens[first, 1] - 8, minlength=8)
    assert (np.abs(counts / first.sum() - 1 / 8) < 4 * np.sqrt(1 / 8 / first.sum())).all()


def test_recall_invalid_fields(make: Callable[..., Any]):
    with pytest.raises(RecipeError, match="noise_vocab: 16 tokens of noise leave 0 of the vocab of 16"):
        make("recall", 1, noise=0.2)


def test_memorization_has_the_same_facts_in_every_split(make: Callable[..., Any]):
    facts: dict[int, int] = {}
    for split in ("train", "valid", "test"):
        for seed in (0, 1):
            batch = tb.open_source("memorization", rows=200, split=split, seed=seed).batch(0)
            for key, value in zip(batch.tokens[:, ::2].flatten().tolist(), batch.targets[:, 1::2].flatten().tolist()):
                assert facts.setdefault(key, value) == value
    assert sorted(facts) == list(range(127))
    assert len(set(facts.values())) == 127 and min(facts.values()) >= 127 and max(facts.values()) < 255
    other = make("memorization", 50, facts=1)
    assert any(facts[key] != value for key, value in zip(other.tokens[0, ::2], other.targets[0, 1::2]))


def test_memorization_rows(make: Callable[..., Any]):
    made = make("memorization", 300, vocab=10, length=8)
    assert (made.tokens[:, 1::2] == 9).all() and (made.tokens[:, ::2] < 4).all()
    assert made.counts[:, 1::2].all() and not made.counts[:, ::2].any()
    assert made.task.references() == {"any value": 1 / 5}
    # what the row shows besides the key says nothing
    values = dict(zip(made.tokens[:, 0].tolist(), made.targets[:, 1].tolist()))
    assert made.by(lambda seen: values[seen[-2]]) == 1.0
