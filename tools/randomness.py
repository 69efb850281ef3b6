"""Random numbers that are a pure function of where they stand: no generator to carry, save or split.

Every number is a hash of a key and a position, so that any row, window or token can be drawn alone, in any order and
by any process, and is the same on every machine.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 4
_FEW = 32
"""Up to so many numbers are put in order by sorting: too few bits for a Feistel network to reach every order."""


def key_of(*parts: int | str | None) -> int:
    """A 64-bit key made of numbers and words; different parts give unrelated keys."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(words: Words) -> Words:
    """Each word hashed (the finaliser of SplitMix64, Steele et al. 2014): a bijection without visible structure."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


class Draws:
    """Independent draws for several rows: ``keys`` [rows], one for each.

    Every draw has a name: another name, another stream of numbers. All answers are [rows, count].
    """

    def __init__(self, keys: Words) -> None:
        self.keys = keys

    @classmethod
    def of_rows(cls, key: int, numbers: Integers) -> Draws:
        """Draws for the rows of these numbers [rows] out of the endless series that ``key`` stands for."""
        return cls(_words(np.array([key], np.uint64), numbers.astype(np.uint64)))

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.keys)

    def integers(self, name: str, count: int, high: int, start: int = 0) -> Integers:
        """Numbers from 0 to ``high - 1`` (``high`` up to 2**31; uneven by at most ``high / 2**32``).

        ``start``: the place in the stream of the first of them, so that a long stream can be had in pieces.
        """
        top = self._stream(name, count, start) >> np.uint64(32)
        return ((top * np.uint64(high)) >> np.uint64(32)).astype(np.int64)

    def uniform(self, name: str, count: int, start: int = 0) -> NDArray[np.float64]:
        """Numbers from 0 up to, without, 1."""
        return (self._stream(name, count, start) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def distinct(self, name: str, count: int, of: int) -> Integers:
        """``count`` different numbers from 0 to ``of - 1``, in random order."""
        if count > of:
            raise ValueError(f"{count} different numbers out of {of}")
        if of <= _FEW:
            return np.argsort(self._stream(name, of, 0), axis=1)[:, :count]
        places = np.broadcast_to(np.arange(count, dtype=np.uint64), (self.rows, count))
        return _permuted(places, self._base(name), of)

    def _base(self, name: str) -> Words:
        return mix(self.keys ^ np.uint64(key_of(name)))[:, None]

    def _stream(self, name: str, count: int, start: int) -> Words:
        return _words(self._base(name), np.arange(start, start + count, dtype=np.uint64))


class Permutation:
    """The numbers from 0 to ``size - 1`` in an order that ``key`` decides; no list of them is ever made."""

    def __init__(self, key: int, size: int) -> None:
        self.key, self.size = key, size

    def __call__(self, places: Integers) -> Integers:
        """The numbers at these places [count]."""
        return _permuted(places.astype(np.uint64), np.array([self.key], np.uint64), self.size)


def _words(keys: Words, positions: Words) -> Words:
    with np.errstate(over="ignore"):
        return mix(keys + (positions + np.uint64(1)) * _GOLDEN)


def _permuted(places: Words, keys: Words, size: int) -> Integers:
    """A Feistel network over the bits that ``size`` needs; what falls outside walks on until it is inside."""
    keys = np.broadcast_to(keys, places.shape)
    numbers = _feistel(places, keys, size)
    outside = numbers >= size
    while outside.any():
        numbers[outside] = _feistel(numbers[outside], keys[outside], size)
        outside = numbers >= size
    return numbers.astype(np.int64)


def _feistel(numbers: Words, keys: Words, size: int) -> Words:
    bits = max(1, (size - 1).bit_length())
    low = np.uint64((bits + 1) // 2)
    left_mask, right_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << int(low)) - 1)
    left, right = numbers >> low, numbers & right_mask
    for turn in range(_ROUNDS):
        # the upper bits of a hash are the better ones, and no half has more than 32
        right = right ^ ((_words(keys, left + np.uint64(2 * turn << 32)) >> np.uint64(32)) & right_mask)
        left = left ^ ((_words(keys, right + np.uint64(2 * turn + 1 << 32)) >> np.uint64(32)) & left_mask)
    return (left << low) | right
