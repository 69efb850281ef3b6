"""Keys and values in a haystack: which value belonged to this key?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..randomness import Draws
from .haystack import noise, plant, slot_at
from .task import IGNORED, Rows, Task, register_task


@register_task("needle_kv")
class KeyValueNeedle(Task):
    """Say which value was planted behind a key, among other pairs, loose values and noise.

    A row is noise in which ``pairs`` different keys stand, each followed by its value, and ``distractors`` values
    without a key. At the end ``queries`` of the keys come again: their values are asked for, and shown if another
    key follows. Tokens are keys from 0 on, then values, then noise. With ``keys: 3, values: 3, noise: 4, pairs: 2,
    queries: 2, distractors: 1, length: 14`` (``.`` is a target that does not count)::

        tokens    8 9 2 3 7 6 5 9 0 3 9 0 3 2
        targets   . . . . . . . . . . . 3 . 3

    Rows of any length can be made in pieces.
    """

    def __init__(
        self,
        *,
        length: Annotated[int, Field(ge=4, description="tokens of a row")] = 256,
        keys: Annotated[int, Field(ge=1, le=2**24, description="tokens that can be keys")] = 16,
        values: Annotated[int, Field(ge=2, le=2**24, description="tokens that can be values")] = 16,
        noise: Annotated[int, Field(ge=1, le=2**24, description="tokens that noise is made of")] = 16,
        pairs: Annotated[int, Field(ge=1, description="keys with values in a row")] = 4,
        queries: Annotated[int, Field(ge=1, description="keys that are asked for")] = 1,
        distractors: Annotated[int, Field(ge=0, description="values without a key")] = 0,
        depth: Annotated[
            float | None,
            Field(ge=0, le=1, description="where the pair asked for is: 0 at the start, 1 at the end; null: anywhere"),
        ] = None,
        align: Annotated[int, Field(ge=1, description="pairs stand at multiples of this, as of a memory's chunk")] = 2,
    ) -> None:
        self.length, self.keys, self.values, self.noise = length, keys, values, noise
        self.pairs, self.queries, self.distractors = pairs, queries, distractors
        self.depth = depth
        self.vocab = keys + values + noise
        self.tail = 2 * queries - 1
        self.step = _step(align)
        self.slots = (length - self.tail) // self.step

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        pairs, queries, planted = fields["pairs"], fields["queries"], fields["pairs"] + fields["distractors"]
        step, tail = _step(fields["align"]), 2 * fields["queries"] - 1
        if pairs > fields["keys"]:
            yield "pairs", f"{fields['keys']} keys are too few for {pairs} pairs"
        if queries > pairs:
            yield "queries", f"expected at most {pairs}, the pairs, got {queries}"
        if planted * step + tail > fields["length"]:
            room = f"{planted} planted at multiples of {step} and {tail} tokens of questions"
            yield "length", f"expected at least {planted * step + tail}, for {room}, got {fields['length']}"
        if fields["depth"] is not None and queries != 1:
            yield "depth", f"is that of the one pair asked for, and {queries} are"

    def rows(self, draws: Draws) -> Rows:
        return self.piece(draws, 0, self.length)

    def piece(self, draws: Draws, start: int, stop: int) -> Rows:
        keys = draws.distinct("keys", self.pairs, self.keys)
        values = self.keys + draws.integers("values", self.pairs, self.values)
        asked = draws.distinct("asked", self.queries, self.pairs)
        places = self.step * self._slots(draws, asked[:, :1])
        tokens = noise(draws, start, stop, self.keys + self.values, self.noise)
        targets = np.full_like(tokens, IGNORED)
        plant(tokens, start, places[:, : self.pairs], keys)
        plant(tokens, start, places[:, : self.pairs] + 1, values)
        loose = self.keys + draws.integers("distractors", self.distractors, self.values)
        plant(tokens, start, places[:, self.pairs :], loose)
        questions = self.length - self.tail + 2 * np.arange(self.queries) + np.zeros((draws.rows, 1), np.int64)
        answers = np.take_along_axis(values, asked, axis=1)
        plant(tokens, start, questions, np.take_along_axis(keys, asked, axis=1))
        plant(tokens, start, questions[:, :-1] + 1, answers[:, :-1])
        plant(targets, start, questions, answers)
        return Rows(tokens, targets)

    def _slots(self, draws: Draws, asked: Any) -> Any:
        """[rows, pairs + distractors] slots, all different; that of the pair asked for is at ``depth``."""
        slots = draws.distinct("slots", self.pairs + self.distractors, self.slots)
        if self.depth is not None:
            wanted = slot_at(self.depth, self.slots)
            # whatever stood there changes places with the pair asked for
            slots = np.where(slots == wanted, np.take_along_axis(slots, asked, axis=1), slots)
            np.put_along_axis(slots, asked, wanted, axis=1)
        return slots

    def references(self) -> dict[str, float]:
        same = 1 / self.values  # two pairs may have the same value
        return {"any value": same, "the value of any pair of the row": 1 / self.pairs + (1 - 1 / self.pairs) * same}


def _step(align: int) -> int:
    """Tokens from one place of a pair to the next: the least multiple of ``align`` that a pair fits in."""
    return align * -(-2 // align)
