"""How often a model's first choice is right: at the tokens that count, and in whole rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...blocks.language_model import IGNORED


class Score(NamedTuple):
    """Counts, so that the scores of several batches or processes can be added before they are divided."""

    right: int
    counted: int
    """Tokens whose target counts."""
    rows_right: int
    rows: int
    """Rows in which at least one target counts."""

    @property
    def accuracy(self) -> float:
        """Share of the counted tokens that are right; NaN where none counts."""
        return self.right / self.counted if self.counted else float("nan")

    @property
    def exact(self) -> float:
        """Share of rows in which every counted token is right; NaN where none counts."""
        return self.rows_right / self.rows if self.rows else float("nan")

    def plus(self, other: Score) -> Score:
        """Both together."""
        return Score(*(mine + theirs for mine, theirs in zip(self, other)))


def score(logits: Tensor, targets: Tensor) -> Score:
    """``logits`` [rows, time, vocab], any float dtype; ``targets`` [rows, time] int64, -100 where nothing counts."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets: expected {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    counts = targets != IGNORED
    right = (logits.argmax(-1) == targets) & counts
    asked = counts.any(-1)
    whole = asked & (right == counts).all(-1)
    return Score(int(right.sum()), int(counts.sum()), int(whole.sum()), int(asked.sum()))


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of the counted tokens at which the largest logit is the target's; NaN where none counts."""
    return score(logits, targets).accuracy


def exact_match(logits: Tensor, targets: Tensor) -> float:
    """Share of the rows in which that is so of every counted token."""
    return score(logits, targets).exact
