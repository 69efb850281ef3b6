"""The interface of a data source: batches that are a pure function of their index."""

from __future__ import annotations

import abc
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from ...registry import Problem, RecipeError, show
from ..randomness import Integers

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class Batch(NamedTuple):
    """Rows of tokens and their targets."""

    tokens: Tensor
    """[rows, time] int64."""
    targets: Tensor
    """[rows, time] int64: the next token; -100 (``blocks.language_model.IGNORED``) where nothing counts."""
    mask: Tensor | None
    """[rows, time] bool: ``False`` for padding; ``None`` if there is none."""
    fresh: Tensor
    """[rows] bool: ``True`` if the row does not continue that of the batch before, so that no state is carried."""
    documents: Tensor | None = None
    """[rows, time] int64: the document of each token, for rows that hold several (``model(documents=)``)."""
    accepted: Tensor | None = None
    """[rows, time, vocab] bool: which tokens count as right; ``None`` if only the target does, and in training."""


class Source(abc.ABC):
    """Batches by index. The same index gives the same batch, in any process and after any interruption."""

    vocab: int
    """Tokens are from 0 to ``vocab - 1``."""
    length: int
    """Tokens of each row of a batch."""
    carries: bool
    """Whether rows continue those of the batch before, so that state is carried."""
    packed: bool = False
    """Whether rows hold several documents."""
    batches: int | None
    """Batches of one epoch; ``None`` if new rows never end."""
    token_values: Tensor | None = None
    """[vocab] float64: the number that each token stands for, if tokens stand for numbers."""
    tokenizer: str | None = None
    """The text of the ``tokenizer.json`` that made the tokens; ``None`` for bytes and tasks."""

    @abc.abstractmethod
    def batch(self, index: int) -> Batch:
        """The batch of an index >= 0, which has no upper limit: epochs follow each other."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """How the source was made and what it holds, as JSON."""


class Share(NamedTuple):
    """This process's rows of every batch: ``rows`` of ``of`` rows, starting with row ``first``."""

    first: int
    rows: int
    of: int

    def numbers(self, index: int) -> Integers:
        """[rows] where the rows of batch ``index`` stand in the endless series of all rows.

        Raises ``ValueError`` for an invalid index.
        """
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"batch({show(index)}): expected integer >= 0")
        return index * self.of + self.first + np.arange(self.rows)


def share_of(rows: int, part: tuple[int, int]) -> Share:
    """The share of process ``part = (rank, world)``. Raises ``RecipeError`` if the rows cannot be divided evenly."""
    rank, world = part
    if world < 1 or not 0 <= rank < world:
        raise RecipeError([Problem("part", f"expected (rank, world) with 0 <= rank < world, got {show(part)}")], "data")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise RecipeError([Problem("rows", f"expected integer >= 1, got {show(rows)}")], "data")
    if rows % world:
        message = f"{rows} rows of a batch cannot be shared by {world} processes: give a multiple of {world}"
        raise RecipeError([Problem("rows", message)], "data")
    return Share(rank * (rows // world), rows // world, rows)
