"""A generated task as a source of batches, and its rows in pieces where they are too long to be held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ...registry import Problem, RecipeError, show
from ..randomness import Draws, Integers, Permutation, key_of
from ..tasks import Rows, Task
from .source import Batch, Share, Split, check_index

MAX_LENGTH = 2**31
"""Tokens of a row: positions in a row are drawn as 31-bit numbers."""


class Generated:
    """Rows of a task. Row ``r`` of batch ``i`` is row ``i * rows + r`` of an endless series, whatever the batch size.

    Each split and each seed is a series of its own; rows are alike by chance alone, where a task has few. With
    ``examples``, training has that many rows, in another order each time they come round; the other splits are
    endless all the same.
    """

    carries = False

    def __init__(
        self,
        name: str,
        task: Task,
        fields: dict[str, Any],
        *,
        share: Share,
        split: Split,
        seed: int,
        examples: int | None,
    ) -> None:
        self.task = task
        self.vocab, self.length = task.vocab, task.length
        self.examples = examples if split == "train" else None
        self._name, self._fields, self._share, self._split, self._seed = name, fields, share, split, seed
        self._key = key_of("task", name, split, seed)
        for attribute, value in (("vocab", self.vocab), ("length", self.length)):
            if not isinstance(value, int) or not 1 <= value <= MAX_LENGTH:
                message = f"expected the task to have an integer from 1 to 2**31, got {show(value)}"
                raise RecipeError([Problem(attribute, message)], name)

    @property
    def batches(self) -> int | None:
        """Batches of one round through ``examples``."""
        return None if self.examples is None else -(-self.examples // self._share.of)

    def batch(self, index: int) -> Batch:
        """Whole rows; all of them start anew."""
        return self._batch(self.task.rows(self._draws(index)), 0, self.length)

    def stream(self, index: int, piece: int) -> Iterator[Batch]:
        """``batch(index)`` in pieces of ``piece`` tokens: for state to be carried from one to the next.

        Only the first is ``fresh``. The needle tasks make one piece at a time, so rows of millions of tokens take no
        more memory than a piece.
        """
        if isinstance(piece, bool) or not isinstance(piece, int) or piece < 1:
            raise ValueError(f"piece: expected integer >= 1, got {show(piece)}")
        draws = self._draws(index)
        for start in range(0, self.length, piece):
            stop = min(start + piece, self.length)
            yield self._batch(self.task.piece(draws, start, stop), start, stop)

    def describe(self) -> dict[str, Any]:
        """The task, its fields, and what predictors get right that do not do it."""
        return {
            "task": self._name,
            "fields": self._fields,
            "vocab": self.vocab,
            "length": self.length,
            "rows": self._share.of,
            "split": self._split,
            "seed": self._seed,
            "examples": self.examples,
            "references": self.task.references(),
        }

    def _draws(self, index: int) -> Draws:
        check_index(index)
        return Draws.of_rows(self._key, self._numbers(index))

    def _numbers(self, index: int) -> Integers:
        numbers = index * self._share.of + self._share.first + np.arange(self._share.rows)
        if self.examples is None:
            return numbers
        rounds, places = np.divmod(numbers, self.examples)
        for turn in np.unique(rounds):
            here = rounds == turn
            places[here] = Permutation(key_of("round", self._key, int(turn)), self.examples)(places[here])
        return places

    def _batch(self, rows: Rows, start: int, stop: int) -> Batch:
        tokens, targets = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)) for part in rows)
        wanted = (self._share.rows, stop - start)
        if tokens.shape != wanted or targets.shape != wanted:
            got = f"{tuple(tokens.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"the task {self._name!r} made tokens and targets of {got}, expected {wanted}")
        return Batch(tokens, targets, None, torch.full((wanted[0],), start == 0))
