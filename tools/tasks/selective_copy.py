"""MAD's selective copying: say again what stood between blanks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..randomness import Draws
from .task import IGNORED, Rows, Task, register_task


@register_task("selective_copy")
class SelectiveCopy(Task):
    """Copy the tokens that stand at random places between blanks, in order.

    A row has ``copied`` tokens from 0 to ``vocab - 3`` scattered among blanks (``vocab - 2``), then ``copied``
    markers (``vocab - 1``). At each marker the next of the tokens is asked for; answers are not shown. With
    ``vocab: 10, length: 10, copied: 3`` (``.`` is a target that does not count)::

        tokens    8 5 8 8 2 5 8 9 9 9
        targets   . . . . . . . 5 2 5

    The published size (MAD, arXiv 2403.17844) is the default.
    """

    def __init__(
        self,
        *,
        vocab: Annotated[int, Field(ge=4, le=2**31, description="tokens, the blank and the marker among them")] = 16,
        length: Annotated[int, Field(ge=2, description="tokens of a row")] = 256,
        copied: Annotated[int, Field(ge=1, description="tokens to copy")] = 16,
    ) -> None:
        self.vocab, self.length, self.copied = vocab, length, copied

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        copied, length = fields["copied"], fields["length"]
        if 2 * copied > length:
            yield "copied", f"{copied} tokens and their copies need a length of at least {2 * copied}, got {length}"

    def rows(self, draws: Draws) -> Rows:
        blank, marker = self.vocab - 2, self.vocab - 1
        source = self.length - self.copied
        content = draws.integers("content", self.copied, self.vocab - 2)
        places = np.sort(draws.distinct("places", self.copied, source), axis=1)
        tokens = np.full((draws.rows, self.length), blank)
        np.put_along_axis(tokens, places, content, axis=1)
        tokens[:, source:] = marker
        targets = np.full_like(tokens, IGNORED)
        targets[:, source:] = content
        return Rows(tokens, targets)

    def references(self) -> dict[str, float]:
        return {"any token that is copied": 1 / (self.vocab - 2)}
