"""What every source of training data gives: batches that are a pure function of their index."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from ...registry import Problem, RecipeError, show

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class Batch(NamedTuple):
    """Rows of tokens and what is to be predicted at each of them."""

    tokens: Tensor
    """[rows, time] int64."""
    targets: Tensor
    """[rows, time] int64: what follows each token; -100 (``blocks.language_model.IGNORED``) where nothing counts."""
    mask: Tensor | None
    """[rows, time] bool: which tokens are real; ``None`` where all are."""
    fresh: Tensor
    """[rows] bool: the row starts anew here, so that no state may be carried into it."""


class Source(Protocol):
    """Batches by number. The same number gives the same batch, in any process and after any interruption."""

    @property
    def vocab(self) -> int:
        """Tokens are from 0 to ``vocab - 1``."""

    @property
    def length(self) -> int:
        """Tokens of each row of a batch."""

    @property
    def carries(self) -> bool:
        """Whether the rows of a batch continue those of the batch before, so that state is carried along."""

    @property
    def batches(self) -> int | None:
        """Batches in which everything there is comes at least once; ``None`` where there is no end of new rows."""

    def batch(self, index: int) -> Batch:
        """The batch of a number, from 0 on, without end: after the last of ``batches`` comes another round."""

    def describe(self) -> dict[str, Any]:
        """What the source was made with and what it holds, as JSON."""


class Share(NamedTuple):
    """Which rows of every batch this process has: ``rows`` of ``of`` rows, from ``first`` on."""

    first: int
    rows: int
    of: int


def share_of(rows: int, part: tuple[int, int]) -> Share:
    """The rows of process ``part = (rank, world)``; all processes' rows together are all rows, in order.

    Raises ``RecipeError`` when ``rows`` do not divide.
    """
    rank, world = part
    if world < 1 or not 0 <= rank < world:
        raise RecipeError([Problem("part", f"expected (rank, world) with 0 <= rank < world, got {show(part)}")], "data")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise RecipeError([Problem("rows", f"expected integer >= 1, got {show(rows)}")], "data")
    if rows % world:
        message = f"{rows} rows of a batch cannot be shared by {world} processes: give a multiple of {world}"
        raise RecipeError([Problem("rows", message)], "data")
    return Share(rank * (rows // world), rows // world, rows)


def check_index(index: int) -> None:
    """Raise ``ValueError`` for what is no number of a batch."""
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"batch({show(index)}): expected integer >= 0")
