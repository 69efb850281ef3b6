"""MAD's in-context recall, with its fuzzy and noisy forms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..randomness import Draws, Integers
from .task import IGNORED, Rows, Task, register_task


@register_task("recall")
class Recall(Task):
    """Recall the value of a key that comes again, among pairs that go on coming.

    A row is a series of keys, each followed by its value. Which value a key has is drawn anew for each row; keys
    come again and again, and from the second time on their values are asked for. Of the tokens that are no noise the
    lower half are keys, the upper half values. With ``vocab: 8, length: 10`` (``.`` is a target that does not count)::

        tokens    2 5 0 7 2 5 3 5 0 7
        targets   . . . . 5 . . . 7 .

    ``motif: 3`` is the fuzzy form: keys and values are words of one to three tokens, and every token of a known value
    is asked for. ``noise: 0.2`` is the noisy form: this share of the tokens is drawn from ``noise_vocab`` tokens of
    their own, at the upper end of the vocabulary, and stands between the pairs.

    The published sizes (MAD, arXiv 2403.17844) are the default, ``motif: 3``, and ``vocab: 32, noise: 0.2``.
    """

    def __init__(
        self,
        *,
        vocab: Annotated[int, Field(ge=4, le=2**16, description="tokens: keys, then values, then noise")] = 16,
        length: Annotated[int, Field(ge=4, description="tokens of a row")] = 128,
        motif: Annotated[int, Field(ge=1, le=8, description="most tokens of a key, and of a value")] = 1,
        noise: Annotated[float, Field(ge=0, lt=1, description="share of the tokens that are noise")] = 0.0,
        noise_vocab: Annotated[int, Field(ge=1, description="tokens that are noise, where there is any")] = 16,
    ) -> None:
        self.vocab, self.length, self.motif, self.noise = vocab, length, motif, noise
        self.noise_vocab = noise_vocab if noise else 0
        self.keys = (vocab - self.noise_vocab) // 2
        self.values = vocab - self.noise_vocab - self.keys

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        if fields["noise"] and fields["vocab"] - fields["noise_vocab"] < 4:
            message = f"{fields['noise_vocab']} tokens of noise leave {fields['vocab'] - fields['noise_vocab']} of the"
            yield "noise_vocab", f"{message} vocab of {fields['vocab']}: two keys and two values are the least"

    def rows(self, draws: Draws) -> Rows:
        key_lengths = 1 + draws.integers("key lengths", self.keys, self.motif)
        value_lengths = 1 + draws.integers("value lengths", self.keys, self.motif)
        key_words = self._different_words(draws, key_lengths)
        value_words = self.keys + draws.integers("values", self.keys * self.motif, self.values)
        value_words = value_words.reshape(draws.rows, self.keys, self.motif)
        # a unit is a pair or a token of noise; more of them than fit are drawn, and the row is cut off
        units = self.length if self.noise else -(-self.length // 2)
        asked = draws.integers("asked", units, self.keys)
        is_noise = draws.uniform("kind", units) < self._noisy_units()
        of_key = np.take_along_axis(key_lengths, asked, axis=1)
        of_value = np.take_along_axis(value_lengths, asked, axis=1)
        widths = np.where(is_noise, 1, of_key + of_value)
        starts = np.cumsum(widths, axis=1) - widths
        known = ~is_noise & _came_before(np.where(is_noise, -1, asked))

        # what would stand past the end is written there, in a margin that is cut off
        tokens = np.zeros((draws.rows, self.length + 1), np.int64)
        targets = np.full_like(tokens, IGNORED)
        row = np.arange(draws.rows)[:, None]

        def put(into: Integers, places: Integers, content: Integers, where: Any) -> None:
            inside = where & (places >= 0) & (places < self.length)
            into[row, np.where(inside, places, self.length)] = content

        if self.noise:
            noise = self.vocab - self.noise_vocab + draws.integers("noise", units, self.noise_vocab)
            put(tokens, starts, noise, is_noise)
        for place in range(self.motif):
            in_key, in_value = ~is_noise & (place < of_key), ~is_noise & (place < of_value)
            put(tokens, starts + place, key_words[row, asked, place], in_key)
            value, at = value_words[row, asked, place], starts + of_key + place
            put(tokens, at, value, in_value)
            put(targets, at - 1, value, in_value & known)
        return Rows(tokens[:, : self.length], targets[:, : self.length])

    def _different_words(self, draws: Draws, lengths: Integers) -> Integers:
        """[rows, keys, motif] tokens, of which the first ``lengths`` are a key's: no two keys are alike."""
        words = np.zeros((*lengths.shape, self.motif), np.int64)
        for length in range(1, self.motif + 1):
            # a word is a number to the base of the alphabet; of each length there are as many as keys, or more
            codes = draws.distinct(f"keys of {length}", self.keys, min(self.keys**length, _MANY))
            spelt = codes[:, :, None] // _powers(self.keys, self.motif) % self.keys
            words = np.where((lengths == length)[:, :, None], spelt, words)
        return words

    def _noisy_units(self) -> float:
        """Share of the units that are noise, so that ``noise`` of the tokens are."""
        pair = self.motif + 1  # tokens of a pair on average
        return self.noise * pair / (1 - self.noise + self.noise * pair)

    def references(self) -> dict[str, float]:
        return {"any value": 1 / self.values}


_MANY = 2**62


def _powers(base: int, count: int) -> Integers:
    return np.array([min(base**exponent, _MANY) for exponent in range(count)], np.int64)


def _came_before(keys: Integers) -> Any:
    """[rows, units] whether the same number stands anywhere to the left."""
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, order, axis=1)
    again = np.zeros(keys.shape, bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    found = np.empty_like(again)
    np.put_along_axis(found, order, again, axis=1)
    return found
