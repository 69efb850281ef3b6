"""Language modelling of a repeating pattern."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..randomness import Draws
from .task import IGNORED, Rows, Task, register_task


@register_task("repeat")
class Repeat(Task):
    """Go on with a pattern that repeats itself.

    A row is a random pattern of ``period`` tokens, again and again; every token after the first pattern is asked
    for. With ``period: 3, length: 8`` (``.`` is a target that does not count)::

        tokens    4 0 9 4 0 9 4 0
        targets   . . 4 0 9 4 0 9
    """

    def __init__(
        self,
        *,
        vocab: Annotated[int, Field(ge=2, le=2**31, description="tokens")] = 16,
        length: Annotated[int, Field(ge=1, description="tokens of a row")] = 64,
        period: Annotated[int, Field(ge=1, description="tokens of the pattern")] = 8,
    ) -> None:
        self.vocab, self.length, self.period = vocab, length, period

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        if fields["period"] > fields["length"]:
            yield "period", f"a pattern of {fields['period']} tokens never comes again in {fields['length']}"

    def rows(self, draws: Draws) -> Rows:
        return self.piece(draws, 0, self.length)

    def piece(self, draws: Draws, start: int, stop: int) -> Rows:
        pattern = draws.integers("pattern", self.period, self.vocab)
        places = np.arange(start, stop)
        targets = np.where(places >= self.period - 1, pattern[:, (places + 1) % self.period], IGNORED)
        return Rows(pattern[:, places % self.period], targets)

    def references(self) -> dict[str, float]:
        return {"any token": 1 / self.vocab}
