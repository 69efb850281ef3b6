"""Regular languages in context: the strings of a random automaton, which a row has for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ..randomness import Draws, Integers
from .task import IGNORED, Rows, Task, register_task

FEWEST = 4
"""States of an automaton, and symbols of its language."""


class Automata(NamedTuple):
    """An automaton for each row, which begins in state 0."""

    edges: Integers
    """[rows, states] the number of edges that leave a state; all are equally likely."""
    symbols: Integers
    """[rows, states, most edges] the symbol of each edge; those of a state are different."""
    next: Integers
    """[rows, states, most edges] the state that an edge leads to."""


@register_task("automaton")
@dataclass(kw_only=True)
class Automaton(Task):
    """Continue the strings of a language that only the row shows (RegBench, arXiv 2401.12973).

    Each row has a random automaton of 4 to ``states`` states over 4 or more of the ``vocab - 1`` symbols. A state has 1
    to ``edges`` edges, each with another symbol, which are equally likely. A row is strings of 1 to ``string`` symbols,
    which all begin in the same state, each followed by a separator (``vocab - 1``). The targets are the symbols of the
    strings, not the separators. Wherever more than one symbol is possible, any of them counts as right in an accuracy.
    With an automaton that alternates between 2 and one of 0 and 5 (``.`` is a target that does not count)::

        tokens    2 0 2 7 2 5 2 0 7 2
        targets   0 2 . 2 5 2 0 . 2 5
        or        5     . 0   5 .   0
    """

    vocab: Annotated[int, Field(ge=FEWEST + 1, le=2**16, description="symbols, and the separator")] = 19
    length: Annotated[int, Field(ge=1, description="tokens of a row")] = 256
    states: Annotated[int, Field(ge=FEWEST, le=256, description="most states of an automaton")] = 12
    edges: Annotated[int, Field(ge=1, le=FEWEST, description="most edges of a state")] = 4
    string: Annotated[int, Field(ge=1, description="most symbols of a string")] = 50

    def automata(self, draws: Draws) -> Automata:
        """The automata of the rows."""
        symbols = self.vocab - 1
        states = FEWEST + draws.integers("states", 1, self.states - FEWEST + 1)
        alphabet = draws.distinct("alphabet", symbols, symbols)
        used = FEWEST + draws.integers("symbols", 1, symbols - FEWEST + 1)
        edges = 1 + draws.integers("edges", self.states, self.edges)
        shape = (draws.rows, self.states, self.edges)
        # a random order of the language's symbols for each state, of which the first few are taken
        order = draws.uniform("order", self.states * symbols).reshape(draws.rows, self.states, symbols)
        order[np.broadcast_to(np.arange(symbols) >= used[:, :, None], order.shape)] = 2.0
        chosen = np.argsort(order, axis=2)[:, :, : self.edges]
        of_edges = np.take_along_axis(alphabet[:, None], chosen, axis=2)
        to = (draws.uniform("next", self.states * self.edges).reshape(shape) * states[:, :, None]).astype(np.int64)
        return Automata(edges, of_edges, to)

    def rows(self, draws: Draws) -> Rows:
        tokens, _ = self._read(draws)
        following = tokens[:, 1:]
        return Rows(tokens[:, :-1], np.where(following == self.vocab - 1, IGNORED, following))

    def accepted(self, draws: Draws) -> NDArray[np.bool_]:
        _, states = self._read(draws)
        automata, row = self.automata(draws), np.arange(draws.rows)[:, None]
        possible = np.arange(self.edges) < automata.edges[row, states][:, :, None]
        found = np.zeros((*states.shape, self.vocab), bool)
        # the symbols beyond a state's edges take a place that is cut off
        symbols = np.where(possible, automata.symbols[row, states], self.vocab - 1)
        np.put_along_axis(found, symbols, True, axis=2)
        found[:, :, -1] = False
        return found

    def _read(self, draws: Draws) -> tuple[Integers, Integers]:
        """[rows, length + 1] tokens, and [rows, length] the states after them."""
        automata, row = self.automata(draws), np.arange(draws.rows)
        choices = draws.uniform("choices", self.length + 1)
        # there are at most as many strings as tokens
        lengths = 1 + draws.integers("lengths", self.length + 1, self.string)
        separators = np.cumsum(lengths + 1, axis=1) - 1
        tokens = np.empty((draws.rows, self.length + 1), np.int64)
        states = np.empty_like(tokens)
        is_separator = np.zeros((draws.rows, separators.max() + 1), bool)
        np.put_along_axis(is_separator, separators, True, axis=1)
        state = np.zeros(draws.rows, np.int64)
        for time in range(self.length + 1):
            edge = (choices[:, time] * automata.edges[row, state]).astype(np.int64)
            ended = is_separator[:, time]
            tokens[:, time] = np.where(ended, self.vocab - 1, automata.symbols[row, state, edge])
            state = states[:, time] = np.where(ended, 0, automata.next[row, state, edge])
        return tokens, states[:, :-1]

    def references(self) -> dict[str, float]:
        symbols = self.vocab - 1
        edges = (1 + self.edges) / 2
        of_language = np.mean([edges / used for used in range(FEWEST, symbols + 1)])
        return {"any symbol": edges / symbols, "any symbol of the language": float(of_language)}
