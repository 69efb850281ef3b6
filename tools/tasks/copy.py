"""Copying: say a whole pattern again."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from ..randomness import Draws
from .task import IGNORED, Rows, Task, register_task

DELIMITER = 0


@register_task("copy")
class Copy(Task):
    """Repeat a pattern after a delimiter.

    A row is a pattern of ``length / 2`` tokens from 1 to ``vocab - 1``, the delimiter 0, and the pattern again but
    for its last token, which is only asked for. With ``length: 8`` (``.`` is a target that does not count)::

        tokens    3 7 7 1 0 3 7 7
        targets   . . . . 3 7 7 1
    """

    def __init__(
        self,
        *,
        vocab: Annotated[int, Field(ge=3, le=2**31, description="tokens, the delimiter 0 among them")] = 10,
        length: Annotated[int, Field(ge=2, multiple_of=2, description="tokens of a row, twice the pattern's")] = 96,
    ) -> None:
        self.vocab, self.length = vocab, length

    def rows(self, draws: Draws) -> Rows:
        half = self.length // 2
        pattern = 1 + draws.integers("pattern", half, self.vocab - 1)
        delimiter = np.full((draws.rows, 1), DELIMITER)
        nothing = np.full((draws.rows, half), IGNORED)
        return Rows(np.hstack([pattern, delimiter, pattern[:, :-1]]), np.hstack([nothing, pattern]))

    def references(self) -> dict[str, float]:
        return {"any token of the pattern's alphabet": 1 / (self.vocab - 1)}
