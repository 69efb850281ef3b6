"""Accuracy of a model's most likely tokens, and the share of rows without an error."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...blocks.language_model import IGNORED


class Score(NamedTuple):
    """Counts, which can be added over batches and processes before they are divided."""

    right: int
    counted: int
    """Tokens whose target counts."""
    rows_right: int
    rows: int
    """Rows with at least one target that counts."""

    @property
    def accuracy(self) -> float:
        """Share of the counted tokens that are right; NaN if there is none."""
        return self.right / self.counted if self.counted else float("nan")

    @property
    def exact(self) -> float:
        """Share of rows in which every counted token is right; NaN if there is none."""
        return self.rows_right / self.rows if self.rows else float("nan")

    def plus(self, other: Score) -> Score:
        """The sum of two scores."""
        return Score(*(mine + theirs for mine, theirs in zip(self, other)))


def score(logits: Tensor, targets: Tensor, accepted: Tensor | None = None) -> Score:
    """``logits`` [rows, time, vocab], any float dtype; ``targets`` [rows, time] int64, -100 where nothing counts.

    ``accepted`` [rows, time, vocab] bool: which tokens are right, by default the target alone.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets: expected {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    counts = targets != IGNORED
    most_likely = logits.argmax(-1, keepdim=True)
    right = most_likely == targets[..., None] if accepted is None else accepted.gather(-1, most_likely)
    right = right.squeeze(-1) & counts
    asked = counts.any(-1)
    exact = asked & (right == counts).all(-1)
    return Score(int(right.sum()), int(counts.sum()), int(exact.sum()), int(asked.sum()))
