"""Rows of noise with something planted in them, of which any piece can be made alone."""

from __future__ import annotations

import numpy as np

from ..randomness import Draws, Integers


def noise(draws: Draws, start: int, stop: int, first: int, alphabet: int) -> Integers:
    """[rows, stop - start] positions ``start`` to ``stop`` of noise from ``first`` to ``first + alphabet - 1``."""
    return first + draws.integers("noise", stop - start, alphabet, start=start)


def plant(piece: Integers, start: int, places: Integers, content: Integers | int) -> None:
    """Write ``content`` [rows, count] at ``places`` [rows, count] of rows of which ``piece`` begins at ``start``.

    What stands outside of the piece is left out.
    """
    rows, columns = np.nonzero((places >= start) & (places < start + piece.shape[1]))
    content = np.broadcast_to(content, places.shape)
    piece[rows, places[rows, columns] - start] = content[rows, columns]


def slot_at(depth: float, slots: int) -> int:
    """The slot at a depth: 0 for the first, 1 for the last."""
    return round(depth * (slots - 1))
