"""Copying tasks: repeat a pattern once, over and over, without the blanks in it, or from a single position."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..randomness import Draws
from .task import IGNORED, Rows, Task, register_task

DELIMITER = 0


@register_task("copy")
@dataclass(kw_only=True)
class Copy(Task):
    """Repeat a pattern after a delimiter.

    A row is a pattern of ``length / 2`` tokens from 1 to ``vocab - 1``, the delimiter 0, and the pattern again without
    its last token, which is only a target. With ``length: 8`` (``.`` is a target that does not count)::

        tokens    3 7 7 1 0 3 7 7
        targets   . . . . 3 7 7 1
    """

    vocab: Annotated[int, Field(ge=3, le=2**31, description="tokens, with the delimiter 0")] = 10
    length: Annotated[int, Field(ge=2, multiple_of=2, description="tokens of a row, twice the pattern's")] = 96

    def rows(self, draws: Draws) -> Rows:
        half = self.length // 2
        pattern = 1 + draws.integers("pattern", half, self.vocab - 1)
        delimiter = np.full((draws.rows, 1), DELIMITER)
        ignored = np.full((draws.rows, half), IGNORED)
        return Rows(np.hstack([pattern, delimiter, pattern[:, :-1]]), np.hstack([ignored, pattern]))

    def references(self) -> dict[str, float]:
        return {"any token of the pattern's alphabet": 1 / (self.vocab - 1)}


@register_task("repeat")
@dataclass(kw_only=True)
class Repeat(Task):
    """Continue a periodic pattern.

    A row is a random pattern of ``period`` tokens, again and again; every token after the first pattern is a target.
    With ``period: 3, length: 8`` (``.`` is a target that does not count)::

        tokens    4 0 9 4 0 9 4 0
        targets   . . 4 0 9 4 0 9
    """

    vocab: Annotated[int, Field(ge=2, le=2**31, description="tokens")] = 16
    length: Annotated[int, Field(ge=1, description="tokens of a row")] = 64
    period: Annotated[int, Field(ge=1, description="tokens of the pattern")] = 8

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        if fields["period"] > fields["length"]:
            yield "period", f"expected at most the length {fields['length']}, got {fields['period']}"

    def rows(self, draws: Draws) -> Rows:
        return self.piece(draws, 0, self.length)

    def piece(self, draws: Draws, start: int, stop: int) -> Rows:
        pattern = draws.integers("pattern", self.period, self.vocab)
        positions = np.arange(start, stop)
        following = pattern[:, (positions + 1) % self.period]
        return Rows(pattern[:, positions % self.period], np.where(positions >= self.period - 1, following, IGNORED))

    def references(self) -> dict[str, float]:
        return {"any token": 1 / self.vocab}


@register_task("selective_copy")
@dataclass(kw_only=True)
class SelectiveCopy(Task):
    """Copy the tokens that stand at random positions among blanks, in order.

    A row has ``copied`` tokens from 0 to ``vocab - 3`` scattered among blanks (``vocab - 2``), then ``copied`` markers
    (``vocab - 1``). The target of each marker is the next of the tokens, which is not shown. With ``vocab: 10,
    length: 10, copied: 3`` (``.`` is a target that does not count)::

        tokens    8 5 8 8 2 5 8 9 9 9
        targets   . . . . . . . 5 2 5

    The default is the published size (MAD, arXiv 2403.17844).
    """

    vocab: Annotated[int, Field(ge=4, le=2**31, description="tokens, with the blank and the marker")] = 16
    length: Annotated[int, Field(ge=2, description="tokens of a row")] = 256
    copied: Annotated[int, Field(ge=1, description="tokens to copy")] = 16

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        copied, length = fields["copied"], fields["length"]
        if 2 * copied > length:
            yield "copied", f"{copied} tokens and their copies need a length of at least {2 * copied}, got {length}"

    def rows(self, draws: Draws) -> Rows:
        blank, marker = self.vocab - 2, self.vocab - 1
        source = self.length - self.copied
        content = draws.integers("content", self.copied, self.vocab - 2)
        positions = np.sort(draws.distinct("places", self.copied, source), axis=1)
        tokens = np.full((draws.rows, self.length), blank)
        np.put_along_axis(tokens, positions, content, axis=1)
        tokens[:, source:] = marker
        targets = np.full_like(tokens, IGNORED)
        targets[:, source:] = content
        return Rows(tokens, targets)

    def references(self) -> dict[str, float]:
        return {"any token that is copied": 1 / (self.vocab - 2)}


@register_task("compression")
@dataclass(kw_only=True)
class Compression(Task):
    """Read tokens, and then say each of them, in order.

    A row has ``length / 2`` tokens from 0 to ``vocab - 2`` and as many markers (``vocab - 1``). The target of marker
    ``i`` is token ``i``. With ``vocab: 16, length: 8`` (``.`` is a target that does not count)::

        tokens    3 11 0 7 15 15 15 15
        targets   .  . . .  3 11  0  7

    The published task (MAD, arXiv 2403.17844) lets a multilayer perceptron say all tokens from the features at one
    position, the first marker. The block ``bottleneck`` of ``titans_build.tools.tasks.bottleneck`` makes a model do
    that. The default is the published size, 31 tokens.
    """

    vocab: Annotated[int, Field(ge=3, le=2**31, description="tokens, with the marker")] = 16
    length: Annotated[int, Field(ge=2, multiple_of=2, description="tokens of a row, twice those to say")] = 62

    def rows(self, draws: Draws) -> Rows:
        half = self.length // 2
        content = draws.integers("content", half, self.vocab - 1)
        marker = np.full((draws.rows, half), self.vocab - 1)
        return Rows(np.hstack([content, marker]), np.hstack([np.full_like(marker, IGNORED), content]))

    def references(self) -> dict[str, float]:
        return {"any token": 1 / (self.vocab - 1)}
