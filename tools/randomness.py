"""Random numbers as a pure function of a key and a position, from NumPy's counter-based generator Philox.

There is no generator state to carry, save or split: any row, window or token can be drawn alone, in any order and by
any process, and is the same on every machine.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]

ORDER = "philox"
"""Recorded with every run, since a run can only be resumed where the same key and position give the same numbers."""
_BLOCK = 4
"""Words that Philox makes of one value of its counter."""
_ROUNDS = 8


def key_of(*parts: int | str | None) -> int:
    """A 64-bit key, the hash of numbers and words."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class Draws:
    """Independent random numbers for several rows of the series ``key``; ``numbers`` [rows]: their indices.

    Every draw has a name, and each name is a stream of its own. All results are [rows, count].
    """

    def __init__(self, key: int, numbers: Integers) -> None:
        self._key, self._numbers = key, numbers

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self._numbers)

    def integers(self, name: str, count: int, high: int, start: int = 0) -> Integers:
        """Integers from 0 to ``high - 1``, where ``high`` is at most 2**45.

        ``start``: position of the first in the stream, so that a long stream can be drawn in pieces.
        """
        return (self.uniform(name, count, start) * high).astype(np.int64)

    def uniform(self, name: str, count: int, start: int = 0) -> NDArray[np.float64]:
        """Numbers from 0 to 1, without 1, with 53 random bits."""
        return (self._words(name, count, start) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def distinct(self, name: str, count: int, of: int) -> Integers:
        """``count`` different integers from 0 to ``of - 1``, in random order."""
        if count > of:
            raise ValueError(f"expected at most {of} different numbers, got {count}")
        if of <= 2 * count + 32:
            return np.argsort(self._words(name, of), axis=1)[:, :count]
        drawn = 2 * count
        while True:
            numbers = self.integers(name, drawn, of)
            new = ~seen_before(numbers)
            if (new.sum(1) >= count).all():
                first = np.argsort(~new, axis=1, kind="stable")[:, :count]
                return np.take_along_axis(numbers, first, axis=1)
            drawn *= 2

    def _words(self, name: str, count: int, start: int = 0) -> Words:
        block, skipped = divmod(start, _BLOCK)
        philox = np.random.Philox(key=key_of(self._key, name))
        state = philox.state
        words = np.empty((self.rows, skipped + count), np.uint64)
        for row, number in enumerate(self._numbers):
            state["state"]["counter"][:] = block, number, 0, 0
            philox.state = state
            words[row] = philox.random_raw(skipped + count)
        return words[:, skipped:]


def seen_before(numbers: Integers) -> NDArray[np.bool_]:
    """[rows, count] whether the same number stands further left in its row."""
    order = np.argsort(numbers, axis=1, kind="stable")
    ordered = np.take_along_axis(numbers, order, axis=1)
    repeated = np.zeros(numbers.shape, bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    found = np.empty_like(repeated)
    np.put_along_axis(found, order, repeated, axis=1)
    return found


class Permutation:
    """The integers from 0 to ``size - 1`` in a random order that ``key`` decides, of which no list is made.

    It is a Feistel network whose round functions are tables of random words, about ``sqrt(size)`` in each. A result
    that is not under ``size`` goes through the network again.
    """

    def __init__(self, key: int, size: int) -> None:
        bits = max(2, (size - 1).bit_length())
        self._size, self._right = size, (bits + 1) // 2
        left, right = (1 << bits // 2) - 1, (1 << self._right) - 1
        words = np.random.Philox(key=key).random_raw(_ROUNDS << self._right).reshape(_ROUNDS, -1)
        self._tables = [
            (table & np.uint64(mask)).astype(np.int64) for table, mask in zip(words, [right, left] * _ROUNDS)
        ]

    def __call__(self, positions: Integers) -> Integers:
        """The integers at these positions [count]."""
        numbers = self._network(positions)
        while (outside := numbers >= self._size).any():
            numbers[outside] = self._network(numbers[outside])
        return numbers

    def _network(self, numbers: Integers) -> Integers:
        left, right = numbers >> self._right, numbers & ((1 << self._right) - 1)
        for to_right, to_left in zip(self._tables[::2], self._tables[1::2]):
            right = right ^ to_right[left]
            left = left ^ to_left[right]
        return (left << self._right) | right


_permutation = functools.lru_cache(maxsize=8)(Permutation)


def shuffled(key: int, numbers: Integers, size: int) -> Integers:
    """Items ``numbers`` of an endless series of epochs. Each has the integers under ``size`` in its own order."""
    epochs, positions = np.divmod(numbers, size)
    found = np.empty_like(numbers)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = _permutation(key_of("round", key, int(epoch)), size)(positions[here])
    return found
