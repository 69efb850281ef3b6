"""Associative recall: MQAR as in Zoology (arXiv 2312.04927); recall in context and from training: MAD (2403.17844)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..randomness import Draws, Integers, key_of, seen_before
from .task import IGNORED, Rows, Task, register_task


@register_task("mqar")
@dataclass(kw_only=True)
class MultiQueryRecall(Task):
    """Recall the values of many keys, each asked for once, sooner more often than later.

    A row begins with ``pairs`` keys, each followed by its value. Keys are from the lower half of the vocabulary
    (never 0), values from the upper half, all different. Then come random tokens of the whole vocabulary, two for each
    place, and each key once more at the start of a place of its own: its value is the target there, and is not shown.
    A random token that equals one of the row's keys is replaced by 0, so that keys occur nowhere else. Place ``i``
    after the pairs has a weight of ``(i + 1) ** (power - 1)``, and the keys' places are drawn by these weights without
    replacement: with a small ``power`` most are near, a few far. With ``pairs: 2, length: 12, vocab: 20`` (``.`` is a
    target that does not count; the keys are 3 and 7)::

        tokens    3 14 7 11  7 18  0 5  3 16  9 2
        targets   .  . .  . 11  .  . . 14  .  . .

    The published sizes are ``vocab: 8192`` with (length, pairs) of (64, 4), (128, 8), (256, 16), (512, 64); the
    defaults suit a CPU.
    """

    vocab: Annotated[int, Field(ge=4, le=2**31, multiple_of=2, description="tokens: keys, then values")] = 256
    length: Annotated[int, Field(ge=4, multiple_of=2, description="tokens of a row")] = 64
    pairs: Annotated[int, Field(ge=1, description="keys with values; all of them are asked for")] = 4
    power: Annotated[float, Field(gt=0, le=1, description="distance of the queries: 1 for uniform")] = 0.01

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        pairs, length, vocab = fields["pairs"], fields["length"], fields["vocab"]
        if 4 * pairs > length:
            yield "pairs", f"{pairs} pairs and their queries need a length of at least {4 * pairs}, got {length}"
        if pairs > vocab // 2 - 1:
            yield "pairs", f"a vocab of {vocab} has {vocab // 2 - 1} keys, which are too few for {pairs} pairs"

    def rows(self, draws: Draws) -> Rows:
        half, context = self.vocab // 2, 2 * self.pairs
        keys = 1 + draws.distinct("keys", self.pairs, half - 1)
        values = half + draws.distinct("values", self.pairs, half)
        tokens = draws.integers("filler", self.length, self.vocab)
        tokens[(tokens[:, :, None] == keys[:, None]).any(-1)] = 0
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        queries = context + 2 * self._places(draws)
        np.put_along_axis(tokens, queries, keys, axis=1)
        targets = np.full_like(tokens, IGNORED)
        np.put_along_axis(targets, queries, values, axis=1)
        return Rows(tokens, targets)

    def _places(self, draws: Draws) -> Any:
        """[rows, pairs] places by weight without replacement: those with the shortest exponential waiting times."""
        count = (self.length - 2 * self.pairs) // 2
        rates = np.arange(1, count + 1) ** (self.power - 1)
        waiting = -np.log1p(-draws.uniform("places", count)) / rates
        chosen = np.argpartition(waiting, self.pairs - 1, axis=1)[:, : self.pairs]
        # which key has the nearest place must be random
        order = draws.distinct("order", self.pairs, self.pairs)
        return np.take_along_axis(np.sort(chosen, axis=1), order, axis=1)

    def references(self) -> dict[str, float]:
        return {"any value": 2 / self.vocab, "any value of the row": 1 / self.pairs}


@register_task("recall")
@dataclass(kw_only=True)
class Recall(Task):
    """Recall the value of a key that comes again, in an endless series of pairs.

    A row is a series of keys, each followed by its value. Each row draws the values of its keys anew. Keys recur, and
    from the second time on their values are targets. Of the tokens that are not noise the lower half are keys, the
    upper half values. With ``vocab: 8, length: 10`` (``.`` is a target that does not count)::

        tokens    2 5 0 7 2 5 3 5 0 7
        targets   . . . . 5 . . . 7 .

    ``motif: 3`` is the fuzzy form: keys and values are words of one to three tokens, and every token of a known value
    is a target. ``noise: 0.2`` is the noisy form: this share of the tokens is drawn from ``noise_vocab`` separate
    tokens, at the upper end of the vocabulary, and stands between the pairs.

    The published sizes (MAD, arXiv 2403.17844) are the default, ``motif: 3``, and ``vocab: 32, noise: 0.2``.
    """

    vocab: Annotated[int, Field(ge=4, le=2**16, description="tokens: keys, then values, then noise")] = 16
    length: Annotated[int, Field(ge=4, description="tokens of a row")] = 128
    motif: Annotated[int, Field(ge=1, le=8, description="most tokens of a key, and of a value")] = 1
    noise: Annotated[float, Field(ge=0, lt=1, description="share of the tokens that are noise")] = 0.0
    noise_vocab: Annotated[int, Field(ge=1, description="alphabet of the noise, if there is any")] = 16

    def __post_init__(self) -> None:
        self.noise_vocab = self.noise_vocab if self.noise else 0
        self.keys = (self.vocab - self.noise_vocab) // 2
        self.values = self.vocab - self.noise_vocab - self.keys

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        left = fields["vocab"] - fields["noise_vocab"]
        if fields["noise"] and left < 4:
            message = f"{fields['noise_vocab']} tokens of noise leave {left} of the vocab of {fields['vocab']}"
            yield "noise_vocab", f"{message}: expected at least 4, for two keys and two values"

    def rows(self, draws: Draws) -> Rows:
        key_lengths = 1 + draws.integers("key lengths", self.keys, self.motif)
        value_lengths = 1 + draws.integers("value lengths", self.keys, self.motif)
        key_words = self._distinct_words(draws, key_lengths)
        value_words = self.keys + draws.integers("values", self.keys * self.motif, self.values)
        value_words = value_words.reshape(draws.rows, self.keys, self.motif)
        # a unit is a pair or a token of noise; there are enough to fill the row, which is then cut off
        units = self.length if self.noise else -(-self.length // 2)
        asked = draws.integers("asked", units, self.keys)
        is_noise = draws.uniform("kind", units) < self._noisy_units()
        of_key = np.take_along_axis(key_lengths, asked, axis=1)
        of_value = np.take_along_axis(value_lengths, asked, axis=1)
        widths = np.where(is_noise, 1, of_key + of_value)
        starts = np.cumsum(widths, axis=1) - widths
        known = ~is_noise & seen_before(np.where(is_noise, -1, asked))

        # one more column takes what stands past the end
        tokens = np.zeros((draws.rows, self.length + 1), np.int64)
        targets = np.full_like(tokens, IGNORED)
        row = np.arange(draws.rows)[:, None]

        def put(into: Integers, positions: Integers, content: Integers, where: Any) -> None:
            inside = where & (positions >= 0) & (positions < self.length)
            into[row, np.where(inside, positions, self.length)] = content

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

    def _distinct_words(self, draws: Draws, lengths: Integers) -> Integers:
        """[rows, keys, motif] tokens, of which the first ``lengths`` are a key's; all keys are different."""
        words = np.zeros((*lengths.shape, self.motif), np.int64)
        powers = np.array([min(self.keys**exponent, _MAX_WORDS) for exponent in range(self.motif)], np.int64)
        for length in range(1, self.motif + 1):
            # a word is a number in base `keys`; there are at least as many of each length as keys
            codes = draws.distinct(f"keys of {length}", self.keys, min(self.keys**length, _MAX_WORDS))
            letters = codes[:, :, None] // powers % self.keys
            words = np.where((lengths == length)[:, :, None], letters, words)
        return words

    def _noisy_units(self) -> float:
        """Share of the units that are noise, so that ``noise`` of the tokens are."""
        pair = self.motif + 1  # average tokens of a pair
        return self.noise * pair / (1 - self.noise + self.noise * pair)

    def references(self) -> dict[str, float]:
        return {"any value": 1 / self.values}


@register_task("memorization")
@dataclass(kw_only=True)
class Memorization(Task):
    """Recall the value of a key from the training data: each key has the same value in every row.

    A row is a series of keys, each followed by a marker (``vocab - 1``), whose target is the key's value. Of the other
    tokens the lower half are keys, the upper half values, all different. ``facts`` decides which value each key has;
    it is the same in all splits. With ``vocab: 9, length: 6`` (``.`` is a target that does not count)::

        tokens    2 8 0 8 2 8
        targets   . 5 . 7 . 5

    The default is the published size (MAD, arXiv 2403.17844), which has ``examples: 256``.
    """

    vocab: Annotated[int, Field(ge=5, le=2**24, description="tokens: keys, then values, then the marker")] = 256
    length: Annotated[int, Field(ge=2, multiple_of=2, description="tokens of a row")] = 32
    facts: Annotated[int, Field(ge=0, description="number of the assignment of values to keys")] = 0

    def __post_init__(self) -> None:
        self.keys = (self.vocab - 1) // 2
        values = self.vocab - 1 - self.keys
        draws = Draws(key_of("memorization", self.facts), np.zeros(1, np.int64))
        self.values = self.keys + draws.distinct("values", self.keys, values)[0]
        """[keys] the value of each key."""

    def rows(self, draws: Draws) -> Rows:
        keys = draws.integers("keys", self.length // 2, self.keys)
        tokens = np.full((draws.rows, self.length), self.vocab - 1)
        tokens[:, ::2] = keys
        targets = np.full_like(tokens, IGNORED)
        targets[:, 1::2] = self.values[keys]
        return Rows(tokens, targets)

    def references(self) -> dict[str, float]:
        return {"any value": 1 / (self.vocab - 1 - self.keys)}


_MAX_WORDS = 2**45
"""The most that ``Draws.integers`` draws from."""
