from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import titans_build as tb
from titans_build.tools.training.train_step import TrainStep
from titans_build.tools.training.validation import validate

SEPARATOR = 18


def transitions(made: Any, row: int) -> list[dict[int, int]]:
    """For each state of a row's automaton, its symbols and the states that they lead to."""
    automata = made.task.automata(made.draws)
    found = []
    for edges, symbols, to in zip(*(part[row].tolist() for part in automata)):
        found.append(dict(zip(symbols[:edges], to[:edges])))
        assert len(found[-1]) == edges, "two edges of a state have the same symbol"
    return found


def test_automaton_accepts_its_rows_and_says_what_may_follow(make: Callable[..., Any]):
    made = make("automaton", 60)
    accepted = made.task.accepted(made.draws)
    assert accepted.shape == (60, 256, 19) and accepted.dtype == bool
    for row in range(60):
        automaton, state = transitions(made, row), 0
        for time, token in enumerate(made.tokens[row].tolist()):
            state = 0 if token == SEPARATOR else automaton[state][token]
            assert set(np.flatnonzero(accepted[row, time])) == set(automaton[state])
    # what follows is one of them, wherever it counts
    followers = np.take_along_axis(accepted, np.maximum(made.targets, 0)[..., None], axis=2)[..., 0]
    assert followers[made.counts].all()


def test_automaton_targets_are_the_symbols_that_follow(make: Callable[..., Any]):
    made = make("automaton", 100)
    following = made.tokens[:, 1:]
    assert (made.counts[:, :-1] == (following != SEPARATOR)).all()
    assert (made.targets[:, :-1] == following)[made.counts[:, :-1]].all()
    assert (made.tokens[:, 0] != SEPARATOR).all() and not (
        (following == SEPARATOR) & (made.tokens[:, :-1] == SEPARATOR)
    ).any()
    strings = [len(string) for row in made.tokens for string in np.split(row, np.flatnonzero(row == SEPARATOR) + 1)]
    assert max(strings) <= 51


def test_automaton_sizes(make: Callable[..., Any]):
    made = make("automaton", 800, length=1)
    automata = made.task.automata(made.draws)
    assert set(np.unique(automata.edges)) == {1, 2, 3, 4}
    assert automata.next.max() == 11 and automata.next.min() == 0
    used = [len(set(symbols.ravel().tolist())) for symbols in automata.symbols]
    assert min(used) == 4 and max(used) == 18


def test_automaton_references(make: Callable[..., Any]):
    made = make("automaton", 400, length=64)
    accepted = made.task.accepted(made.draws)
    references = made.task.references()
    assert references["any symbol"] == 2.5 / 18
    any_symbol = accepted[made.counts][:, :18].mean()
    assert abs(any_symbol - 2.5 / 18) < 0.02  # states with many edges are not visited more often than others
    assert 0.2 < references["any symbol of the language"] < 0.3


def test_automaton_splits_share_no_language():
    def languages(split: Any) -> set[bytes]:
        source = tb.open_source("automaton:length=4", rows=300, split=split)
        edges, symbols, to = source.task.automata(source._draws(0))  # type: ignore[attr-defined]
        return {part.tobytes() for part in np.concatenate([edges[..., None], symbols, to], axis=2)}

    train, test = languages("train"), languages("test")
    assert len(train) == len(test) == 300 and not train & test


def test_automaton_only_held_out_batches_say_what_is_accepted():
    train, test = (tb.open_source("automaton:length=16", rows=2, split=split).batch(0) for split in ("train", "test"))
    assert train.accepted is None and test.accepted is not None and test.accepted.shape == (2, 16, 19)


def test_automaton_accuracy_of_a_validation_counts_every_possible_symbol(tiny_step: Callable[[int], TrainStep]):
    step, source = tiny_step(19), tb.open_source("automaton:length=40", rows=8, split="valid")
    right, counted, exactly = 0, 0, 0
    for index in range(2):
        batch = source.batch(index)
        with torch.no_grad():
            said = step.model(batch.tokens).logits.argmax(-1)
        for row, time in zip(*torch.nonzero(batch.targets != -100, as_tuple=True)):
            counted += 1
            right += bool(batch.accepted[row, time, said[row, time]])  # type: ignore[index]
            exactly += bool(said[row, time] == batch.targets[row, time])
    assert validate(step, source, 2)["accuracy"] == pytest.approx(right / counted)
    assert right > exactly
