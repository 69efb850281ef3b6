"""Multi-query associative recall, as Zoology (arXiv 2312.04927) sets it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..randomness import Draws
from .task import IGNORED, Rows, Task, register_task


@register_task("mqar")
class MultiQueryRecall(Task):
    """Recall the values of many keys, each asked for once, sooner more often than later.

    A row begins with ``pairs`` keys, each followed by its value. Keys are from the lower half of the vocabulary
    (never 0), values from the upper half, none twice. What follows are random tokens of the whole vocabulary, two for
    each place, and each key once more at the start of a place of its own: its value is asked for there, and not
    shown. Where chance would put one of the row's keys among the random tokens stands 0, so that a key is followed by
    its value, or asked for, and stands nowhere else. The place ``i`` after the pairs has a weight of ``(i + 1) **
    (power - 1)``, and the keys' places are drawn by these weights without being put back: with a small ``power`` most
    are near, a few far. With ``pairs: 2, length: 12, vocab: 20`` (``.`` is a target that does not count; keys are 3
    and 7)::

        tokens    3 14 7 11  7 18  0 5  3 16  9 2
        targets   .  . .  . 11  .  . . 14  .  . .

    The published sizes are ``vocab: 8192`` with (length, pairs) of (64, 4), (128, 8), (256, 16), (512, 64); the
    defaults are a size for a CPU.
    """

    def __init__(
        self,
        *,
        vocab: Annotated[int, Field(ge=4, le=2**31, multiple_of=2, description="tokens: keys, then values")] = 256,
        length: Annotated[int, Field(ge=4, multiple_of=2, description="tokens of a row")] = 64,
        pairs: Annotated[int, Field(ge=1, description="keys with values; all of them are asked for")] = 4,
        power: Annotated[float, Field(gt=0, le=1, description="how far queries reach: 1 for evenly")] = 0.01,
    ) -> None:
        self.vocab, self.length, self.pairs, self.power = vocab, length, pairs, power

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
        """[rows, pairs] places, drawn by weight: the ``pairs`` smallest of exponential waiting times are that."""
        count = (self.length - 2 * self.pairs) // 2
        rates = np.arange(1, count + 1) ** (self.power - 1)
        waiting = -np.log1p(-draws.uniform("places", count)) / rates
        nearest = np.argpartition(waiting, self.pairs - 1, axis=1)[:, : self.pairs]
        # the first to come is the nearest one: which key has it must be chance
        order = draws.distinct("order", self.pairs, self.pairs)
        return np.take_along_axis(np.sort(nearest, axis=1), order, axis=1)

    def references(self) -> dict[str, float]:
        return {"any value": 2 / self.vocab, "any value of the row": 1 / self.pairs}
