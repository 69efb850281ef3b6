"""Needle-in-a-haystack tasks: recall what was planted in noise, or where. Any piece of a row can be made alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ..randomness import Draws, Integers
from .task import IGNORED, Rows, Task, register_task

_Depth = Annotated[
    float | None, Field(ge=0, le=1, description="position of the needle: 0 at the start, 1 at the end; null: anywhere")
]


@register_task("needle")
@dataclass(kw_only=True)
class Needle(Task):
    """Recall what was planted in noise, or where, however long ago.

    A row is noise that contains a marker followed by a value of ``width`` tokens, and the marker again at the end: the
    value is its target. Tokens are values from 0 on, then ``noise`` tokens that occur only in noise, and last the
    marker. With ``values: 4, noise: 4, width: 2, length: 11`` the marker is 8 (``.`` is a target that does not
    count)::

        tokens    5 7 4 8 2 0 6 6 4 8 2
        targets   . . . . . . . . . 2 0

    With ``ask: place`` the target is in which of ``values`` equal parts of the row the needle stood. With
    ``values: 4, noise: 4, width: 1``, in the second of four::

        tokens    5 7 4 8 2 0 6 6 4 5 8
        targets   . . . . . . . . . . 1

    Rows of any length can be made in pieces.
    """

    length: Annotated[int, Field(ge=4, description="tokens of a row")] = 256
    values: Annotated[int, Field(ge=2, le=2**24, description="alphabet of the value")] = 16
    noise: Annotated[int, Field(ge=1, le=2**24, description="alphabet of the noise")] = 16
    width: Annotated[int, Field(ge=1, description="tokens of the value")] = 1
    depth: _Depth = None
    align: Annotated[int, Field(ge=1, description="needles stand at multiples of this, as of a memory's chunk")] = 1
    ask: Annotated[Literal["value", "place"], Field(description="what was planted, or where")] = "value"

    def __post_init__(self) -> None:
        self.vocab = self.values + self.noise + 1
        self.marker = self.vocab - 1
        self.tail = self.width if self.ask == "value" else 1
        self.slots = _needle_slots(self.length, self.width, self.align, self.ask)

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        slots = _needle_slots(fields["length"], fields["width"], fields["align"], fields["ask"])
        if slots < 1:
            yield "length", f"{fields['length']} tokens have no room for a value of {fields['width']} and the question"
        elif fields["ask"] == "place" and fields["depth"] is not None:
            yield "depth", "the place cannot be asked for if it is always the same"
        elif fields["ask"] == "place" and slots < fields["values"]:
            yield "values", f"expected at most {slots}, the possible places of a needle, got {fields['values']}"

    def rows(self, draws: Draws) -> Rows:
        return self.piece(draws, 0, self.length)

    def piece(self, draws: Draws, start: int, stop: int) -> Rows:
        slot = draws.integers("slot", 1, self.slots)
        if self.depth is not None:
            slot = np.full_like(slot, _slot_at(self.depth, self.slots))
        value = draws.integers("value", self.width, self.values)
        position = slot * self.align
        answer = value if self.ask == "value" else slot * self.values // self.slots
        tokens = _noise(draws, start, stop, self.values, self.noise)
        targets = np.full_like(tokens, IGNORED)
        _plant(tokens, start, position, self.marker)
        _plant(tokens, start, position + 1 + np.arange(self.width), value)
        end = np.broadcast_to(self.length - self.tail + np.arange(self.tail), (draws.rows, self.tail))
        _plant(tokens, start, end[:, :1], self.marker)
        _plant(tokens, start, end[:, 1:], value[:, : self.tail - 1])
        _plant(targets, start, end, answer)
        return Rows(tokens, targets)

    def references(self) -> dict[str, float]:
        if self.ask == "value":
            return {"any value": 1 / self.values}
        return {"always the likeliest place": -(-self.slots // self.values) / self.slots}


@register_task("needle_kv")
@dataclass(kw_only=True)
class KeyValueNeedle(Task):
    """Recall which value followed a key, among other pairs, single values and noise.

    A row is noise that contains ``pairs`` different keys, each followed by its value, and ``distractors`` values
    without a key. At the end ``queries`` of the keys come again. Their values are the targets, and are shown if
    another key follows. Tokens are keys from 0 on, then values, then noise. With ``keys: 3, values: 3, noise: 4,
    pairs: 2, queries: 2, distractors: 1, length: 14`` (``.`` is a target that does not count)::

        tokens    8 9 2 3 7 6 5 9 0 3 9 0 3 2
        targets   . . . . . . . . . . . 3 . 3

    Rows of any length can be made in pieces.
    """

    length: Annotated[int, Field(ge=4, description="tokens of a row")] = 256
    keys: Annotated[int, Field(ge=1, le=2**24, description="alphabet of the keys")] = 16
    values: Annotated[int, Field(ge=2, le=2**24, description="alphabet of the values")] = 16
    noise: Annotated[int, Field(ge=1, le=2**24, description="alphabet of the noise")] = 16
    pairs: Annotated[int, Field(ge=1, description="keys with values in a row")] = 4
    queries: Annotated[int, Field(ge=1, description="keys that are asked for")] = 1
    distractors: Annotated[int, Field(ge=0, description="values without a key")] = 0
    depth: _Depth = None
    align: Annotated[int, Field(ge=1, description="pairs stand at multiples of this, as of a memory's chunk")] = 2

    def __post_init__(self) -> None:
        self.vocab = self.keys + self.values + self.noise
        self.tail = 2 * self.queries - 1
        self.step = _pair_step(self.align)
        self.slots = (self.length - self.tail) // self.step

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        pairs, queries, planted = fields["pairs"], fields["queries"], fields["pairs"] + fields["distractors"]
        step, tail = _pair_step(fields["align"]), 2 * fields["queries"] - 1
        if pairs > fields["keys"]:
            yield "pairs", f"{fields['keys']} keys are too few for {pairs} pairs"
        if queries > pairs:
            yield "queries", f"expected at most {pairs}, the pairs, got {queries}"
        if planted * step + tail > fields["length"]:
            room = f"{planted} planted at multiples of {step} and {tail} tokens of questions"
            yield "length", f"expected at least {planted * step + tail}, for {room}, got {fields['length']}"
        if fields["depth"] is not None and queries != 1:
            yield "depth", f"expected a single query, got {queries}"

    def rows(self, draws: Draws) -> Rows:
        return self.piece(draws, 0, self.length)

    def piece(self, draws: Draws, start: int, stop: int) -> Rows:
        keys = draws.distinct("keys", self.pairs, self.keys)
        values = self.keys + draws.integers("values", self.pairs, self.values)
        asked = draws.distinct("asked", self.queries, self.pairs)
        positions = self.step * self._slots(draws, asked[:, :1])
        tokens = _noise(draws, start, stop, self.keys + self.values, self.noise)
        targets = np.full_like(tokens, IGNORED)
        _plant(tokens, start, positions[:, : self.pairs], keys)
        _plant(tokens, start, positions[:, : self.pairs] + 1, values)
        single = self.keys + draws.integers("distractors", self.distractors, self.values)
        _plant(tokens, start, positions[:, self.pairs :], single)
        questions = self.length - self.tail + 2 * np.arange(self.queries) + np.zeros((draws.rows, 1), np.int64)
        answers = np.take_along_axis(values, asked, axis=1)
        _plant(tokens, start, questions, np.take_along_axis(keys, asked, axis=1))
        _plant(tokens, start, questions[:, :-1] + 1, answers[:, :-1])
        _plant(targets, start, questions, answers)
        return Rows(tokens, targets)

    def _slots(self, draws: Draws, asked: Any) -> Any:
        """[rows, pairs + distractors] different slots; the pair that is asked for has the one at ``depth``."""
        slots = draws.distinct("slots", self.pairs + self.distractors, self.slots)
        if self.depth is not None:
            wanted = _slot_at(self.depth, self.slots)
            # whatever stood there changes places with the pair that is asked for
            slots = np.where(slots == wanted, np.take_along_axis(slots, asked, axis=1), slots)
            np.put_along_axis(slots, asked, wanted, axis=1)
        return slots

    def references(self) -> dict[str, float]:
        same = 1 / self.values  # two pairs may have the same value
        return {"any value": same, "the value of any pair of the row": 1 / self.pairs + (1 - 1 / self.pairs) * same}


def _noise(draws: Draws, start: int, stop: int, first: int, alphabet: int) -> Integers:
    """[rows, stop - start] positions ``start`` to ``stop`` of noise from ``first`` to ``first + alphabet - 1``."""
    return first + draws.integers("noise", stop - start, alphabet, start=start)


def _plant(piece: Integers, start: int, positions: Integers, content: Integers | int) -> None:
    """Write ``content`` at ``positions``, both [rows, count], of rows whose ``piece`` begins at ``start``."""
    rows, columns = np.nonzero((positions >= start) & (positions < start + piece.shape[1]))
    content = np.broadcast_to(content, positions.shape)
    piece[rows, positions[rows, columns] - start] = content[rows, columns]


def _slot_at(depth: float, slots: int) -> int:
    """The slot at a depth: 0 for the first, 1 for the last."""
    return round(depth * (slots - 1))


def _needle_slots(length: int, width: int, align: int, ask: str) -> int:
    """Possible places of a needle that ends before the question."""
    tail = width if ask == "value" else 1
    room = length - tail - (1 + width)
    return room // align + 1 if room >= 0 else 0


def _pair_step(align: int) -> int:
    """The least multiple of ``align`` that has room for a pair."""
    return align * -(-2 // align)
