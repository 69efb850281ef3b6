"""Where a state comes from: the mark by which a model knows its own states from those of another recipe."""

from __future__ import annotations

import torch
from torch import Tensor

_names: dict[int, str] = {}  # what the recipes that this process has built are called, for messages


class Origin:
    """A recipe's fingerprint, as the states of its models carry it: one int64 in each row.

    States of two recipes may agree in every shape and still mean different things (a chunk of 16 tokens or of 32).
    The mark is a tensor with the row first, like all of a state, so that it goes wherever the row goes: selected,
    joined, moved, saved, sent to another process.
    """

    def __init__(self, fingerprint: str = "0" * 16, name: str = "") -> None:
        """``fingerprint``: 16 hex digits. Models made without a recipe have that of zeros in common."""
        self.number = int.from_bytes(bytes.fromhex(fingerprint), "big", signed=True)
        if name:
            _names[self.number] = name

    def mark(self, rows: int, device: torch.device) -> Tensor:
        """``[rows]`` int64."""
        return torch.full((rows,), self.number, dtype=torch.int64, device=device)

    def check(self, marks: Tensor) -> None:
        """Raise ``ValueError`` naming both recipes unless every one of ``marks`` is that of this recipe."""
        if marks.is_meta or torch.compiler.is_compiling():  # there are no values to look at
            return
        foreign = next((mark for mark in marks.flatten().tolist() if mark != self.number), None)
        if foreign is not None:
            raise ValueError(
                f"the state is of another recipe: it is of {_called(int(foreign))}, the model of {_called(self.number)}"
            )


def _called(number: int) -> str:
    fingerprint = number.to_bytes(8, "big", signed=True).hex()
    return f"{_names[number]!r} ({fingerprint})" if number in _names else f"a recipe with fingerprint {fingerprint}"
