"""Text in rows of equal length: in random order, or every document from its beginning to its end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...blocks.language_model import IGNORED
from ..randomness import Integers, Permutation, key_of
from .documents import Documents, Spans
from .source import Batch, Share, Split, check_index


class _Windows:
    """What both ways to read a text have in common: it is cut into windows, and rounds read each of them."""

    carries: bool
    """Whether the rows of a batch go on in the next one."""
    shuffled: str
    """What the seed puts into an order."""

    def __init__(
        self,
        documents: Documents,
        spans: Spans,
        *,
        length: int,
        share: Share,
        split: Split,
        seed: int,
    ) -> None:
        self.vocab, self.length = documents.vocab, length
        self._documents, self._spans, self._share, self._split = documents, spans, share, split
        self._key = key_of(self.shuffled, split, seed)
        self._windows = self._lay_out()

    @property
    def batches(self) -> int:
        """Batches of one round."""
        return -(-self._windows // self._share.of)

    def _lay_out(self) -> int:
        """Lay the text end to end, and return how many windows it has."""
        raise NotImplementedError


class Shuffled(_Windows):
    """Windows of the text laid end to end, each once in a round, in an order that the seed decides.

    A window may reach from one document into the next; the first token of a document is never asked for. The last
    window ends where the text ends, so it repeats a part of the one before it. Only a text that is shorter than a
    window is filled up (``mask``). The last batch of a round goes on with the next round's first windows. The order is
    computed window by window and takes no memory.
    """

    carries, shuffled = False, "windows"

    def _lay_out(self) -> int:
        self._ends = np.cumsum(self._spans.lengths)
        self._total = int(self._ends[-1])
        return -(-self._total // self.length)

    def batch(self, index: int) -> Batch:
        """Rows that have nothing to do with one another."""
        check_index(index)
        numbers = index * self._share.of + self._share.first + np.arange(self._share.rows)
        rounds, places = np.divmod(numbers, self._windows)
        rows = _Rows(self._share.rows, self.length)
        for turn in np.unique(rounds):
            here = np.flatnonzero(rounds == turn)
            order = Permutation(key_of("round", self._key, int(turn)), self._windows)
            for row, window in zip(here, order(places[here])):
                self._fill(rows, int(row), int(window))
        return rows.batch(np.ones(self._share.rows, bool))

    def _fill(self, rows: _Rows, row: int, window: int) -> None:
        start = max(0, min(window * self.length, self._total - self.length))
        stop = min(start + self.length, self._total)
        column = 0
        span = int(np.searchsorted(self._ends, start, side="right"))
        while start + column < stop:
            here = start + column - int(self._ends[span] - self._spans.lengths[span])
            count = min(stop - start - column, int(self._spans.lengths[span]) - here)
            rows.put(row, column, _read(self._documents, self._spans, span, here, here + count + 1), count)
            column += count
            span += 1

    def describe(self) -> dict[str, Any]:
        """How the text is laid out."""
        return {"documents": "shuffled", "windows": self._windows, "tokens": self._total}


class Ordered(_Windows):
    """Every row reads documents from beginning to end, and the rows of a batch go on in the next one.

    Documents are put in an order that the seed decides (other splits are read as they stand), cut into windows and
    laid end to end; each row has an equal part of that line, and begins anew (``fresh``) at the start of its part and
    of every document. A document's last window is filled up (``mask``). Where the parts do not come out even, a row
    ends with the first window of the part after its own.
    """

    carries, shuffled = True, "documents"

    def _lay_out(self) -> int:
        # a span's last token is only ever asked for
        self._counts = -(-(self._spans.lengths - 1) // self.length)
        self._latest: tuple[int, Integers, Integers] | None = None
        return int(self._counts.sum())

    def batch(self, index: int) -> Batch:
        """One window of each row's part of the line."""
        check_index(index)
        turn, step = divmod(index, self.batches)
        order, ends = self._order(turn)
        rows = _Rows(self._share.rows, self.length)
        fresh = np.zeros(self._share.rows, bool)
        for row in range(self._share.rows):
            window = (self._share.first + row) * self._windows // self._share.of + step
            place = int(np.searchsorted(ends, window, side="right"))
            span = int(order[place])
            within = window - int(ends[place] - self._counts[span])
            start = within * self.length
            stop = min(start + self.length, int(self._spans.lengths[span]) - 1)
            rows.put(row, 0, _read(self._documents, self._spans, span, start, stop + 1), stop - start)
            fresh[row] = step == 0 or within == 0
        return rows.batch(fresh)

    def _order(self, turn: int) -> tuple[Integers, Integers]:
        """The spans in this round's order, and the number of windows up to the end of each."""
        if self._latest is None or self._latest[0] != turn:
            order = np.arange(len(self._counts))
            if self._split == "train":
                order = Permutation(key_of("round", self._key, turn), len(order))(order)
            self._latest = turn, order, np.cumsum(self._counts[order])
        return self._latest[1:]

    def describe(self) -> dict[str, Any]:
        """How the text is laid out."""
        return {"documents": "ordered", "windows": self._windows, "tokens": int(self._spans.lengths.sum())}


class _Rows:
    """A batch that is being filled; what is not is padding."""

    def __init__(self, rows: int, length: int) -> None:
        self.tokens = np.zeros((rows, length), np.int64)
        self.targets = np.full((rows, length), IGNORED, np.int64)
        self.mask = np.zeros((rows, length), bool)

    def put(self, row: int, column: int, text: Any, count: int) -> None:
        """``count`` tokens of ``text`` at a place, and what follows each of them in it."""
        self.tokens[row, column : column + count] = text[:count]
        self.targets[row, column : column + len(text) - 1] = text[1:]
        self.mask[row, column : column + count] = True

    def batch(self, fresh: Any) -> Batch:
        """The rows as tensors."""
        mask = None if self.mask.all() else torch.from_numpy(self.mask)
        return Batch(torch.from_numpy(self.tokens), torch.from_numpy(self.targets), mask, torch.from_numpy(fresh))


def _read(documents: Documents, spans: Spans, span: int, start: int, stop: int) -> Any:
    """Tokens of a span, up to its end at most."""
    first = int(spans.starts[span])
    return documents.read(int(spans.documents[span]), first + start, min(first + stop, int(spans.stops[span])))
