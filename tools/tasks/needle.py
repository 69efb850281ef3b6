"""A needle in a haystack: what was planted in noise, or where."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ..randomness import Draws
from .haystack import noise, plant, slot_at
from .task import IGNORED, Rows, Task, register_task


@register_task("needle")
class Needle(Task):
    """Say what was planted in noise, or where, however long ago.

    A row is noise in which a marker stands once, followed by a value of ``width`` tokens, and at the end the marker
    again: what follows it is asked for. Tokens are values from 0 on, then ``noise`` tokens that are nothing but
    noise, and last the marker. With ``values: 4, noise: 4, width: 2, length: 11`` the marker is 8 (``.`` is a target
    that does not count)::

        tokens    5 7 4 8 2 0 6 6 4 8 2
        targets   . . . . . . . . . 2 0

    With ``ask: place`` what is asked for is in which of ``values`` equal parts of the row the needle stood; with
    ``values: 4, noise: 4, width: 1``, in the second of four::

        tokens    5 7 4 8 2 0 6 6 4 5 8
        targets   . . . . . . . . . . 1

    Rows of any length can be made in pieces.
    """

    def __init__(
        self,
        *,
        length: Annotated[int, Field(ge=4, description="tokens of a row")] = 256,
        values: Annotated[int, Field(ge=2, le=2**24, description="tokens that a value is made of")] = 16,
        noise: Annotated[int, Field(ge=1, le=2**24, description="tokens that noise is made of")] = 16,
        width: Annotated[int, Field(ge=1, description="tokens of the value")] = 1,
        depth: Annotated[
            float | None,
            Field(ge=0, le=1, description="where the needle is: 0 at the start, 1 at the end; null: anywhere"),
        ] = None,
        align: Annotated[
            int, Field(ge=1, description="needles stand at multiples of this, as of a memory's chunk")
        ] = 1,
        ask: Annotated[Literal["value", "place"], Field(description="what was planted, or where")] = "value",
    ) -> None:
        self.length, self.values, self.noise = length, values, noise
        self.width, self.depth, self.align, self.ask = width, depth, align, ask
        self.vocab = values + noise + 1
        self.marker = self.vocab - 1
        self.tail = width if ask == "value" else 1
        self.slots = _slots(length, width, align, ask)

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        slots = _slots(fields["length"], fields["width"], fields["align"], fields["ask"])
        if slots < 1:
            yield "length", f"{fields['length']} tokens have no room for a value of {fields['width']} and the question"
        elif fields["ask"] == "place" and fields["depth"] is not None:
            yield "depth", "where the needle is cannot be asked when it is always at the same depth"
        elif fields["ask"] == "place" and slots < fields["values"]:
            yield "values", f"expected at most {slots}, the places a needle can be at, got {fields['values']}"

    def rows(self, draws: Draws) -> Rows:
        return self.piece(draws, 0, self.length)

    def piece(self, draws: Draws, start: int, stop: int) -> Rows:
        slot = draws.integers("slot", 1, self.slots)
        if self.depth is not None:
            slot = np.full_like(slot, slot_at(self.depth, self.slots))
        value = draws.integers("value", self.width, self.values)
        place, question = slot * self.align, self.length - self.tail
        asked = value if self.ask == "value" else slot * self.values // self.slots
        tokens = noise(draws, start, stop, self.values, self.noise)
        targets = np.full_like(tokens, IGNORED)
        offsets = np.arange(self.width)
        plant(tokens, start, place, self.marker)
        plant(tokens, start, place + 1 + offsets, value)
        at_end = np.broadcast_to(question + np.arange(self.tail), (draws.rows, self.tail))
        plant(tokens, start, at_end[:, :1], self.marker)
        plant(tokens, start, at_end[:, 1:], value[:, : self.tail - 1])
        plant(targets, start, at_end, asked)
        return Rows(tokens, targets)

    def references(self) -> dict[str, float]:
        if self.ask == "value":
            return {"any value": 1 / self.values}
        return {"always the likeliest place": -(-self.slots // self.values) / self.slots}


def _slots(length: int, width: int, align: int, ask: str) -> int:
    """Places a needle can be at: it ends before the question."""
    tail = width if ask == "value" else 1
    room = length - tail - (1 + width)
    return room // align + 1 if room >= 0 else 0
