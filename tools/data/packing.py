"""Text whose rows hold several documents, each of which starts from a fresh state (``Batch.documents``)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..randomness import shuffled
from .source import Batch
from .windows import OrderedText, RowsBuffer, TextSource


class PackedText(TextSource):
    """Rows of whole documents, each once in an epoch, in an order that the seed decides.

    A document's last token is only a target, so ``n`` tokens take ``n - 1`` places of a row. Documents that take more
    places than a row has are cut: each row that they fill, and the rest, is a document of its own. Documents and rests
    are packed by first-fit decreasing, the same way in every epoch; only the ends of rows are padded (``mask``). The
    last batch of an epoch is filled with the first rows of the next.
    """

    carries, packed, shuffled = False, True, "packed rows"

    def _count_windows(self) -> int:
        places = self._spans.lengths - 1
        self._filled = np.cumsum(places // self.length)
        rests = places % self.length
        order = np.flatnonzero(rests)
        if len(order):  # which documents of equal length share a row
            order = order[shuffled(self._key, np.arange(len(order)), len(order))]
        self._rests = order[np.argsort(rests[order], kind="stable")]
        sizes, counts = np.unique(rests[order], return_counts=True)
        self._plans = pack_rows(sizes.tolist(), counts.tolist(), self.length)
        self._firsts = [plan.first for plan in self._plans]
        windows = int(self._filled[-1]) + sum(plan.rows for plan in self._plans)
        self.padded = windows * self.length - int(places.sum())
        self.cut = int((places > self.length).sum())
        return windows

    def batch(self, index: int) -> Batch:
        """Unrelated rows, with the documents of each."""
        rows = RowsBuffer(self._share.rows, self.length)
        for row, window in enumerate(shuffled(self._key, self._share.numbers(index), self.windows).tolist()):
            column = 0
            for number, (span, start) in enumerate(self._content(window)):
                text = self._read(span, start, start + self.length + 1)
                rows.put(row, column, text, len(text) - 1, number)
                column += len(text) - 1
        return rows.batch(np.ones(self._share.rows, bool), packed=True)

    def _content(self, window: int) -> list[tuple[int, int]]:
        """The spans in a row, and the token at which each begins there."""
        filled = int(self._filled[-1])
        if window < filled:
            span = int(np.searchsorted(self._filled, window, side="right"))
            places = int(self._spans.lengths[span]) - 1
            return [(span, (window - int(self._filled[span]) + places // self.length) * self.length)]
        plan = self._plans[bisect.bisect_right(self._firsts, window - filled) - 1]
        row = window - filled - plan.first
        spans = [
            span
            for first, count in plan.content
            for span in self._rests[first + row * count : first + (row + 1) * count].tolist()
        ]
        return [(span, (int(self._spans.lengths[span]) - 1) // self.length * self.length) for span in spans]


class PackedOrderedText(OrderedText):
    """Every row reads documents from beginning to end, one after the other, and continues in the next batch.

    Documents are laid end to end in the order of ``OrderedText``, and each row has an equal part of that line. A
    document goes on in the next batch with its state. It is cut only where a part ends. Only the ends of the parts are
    padded (``mask``).
    """

    packed = True

    def _count_windows(self) -> int:
        # a span's last token is only a target
        self._counts = self._spans.lengths - 1
        self._latest = None
        self._total, of = int(self._counts.sum()), self._share.of
        windows = of * -(-self._total // (of * self.length))
        self.padded = windows * self.length - self._total
        return windows

    def batch(self, index: int) -> Batch:
        """The next places of each row's part, and the documents in them."""
        numbers, step, order, ends = self._parts(index)
        rows = RowsBuffer(self._share.rows, self.length)
        for row, number in enumerate(numbers):
            part, end = (n * self._total // self._share.of for n in (number, number + 1))
            start = part + step * self.length
            self._fill(rows, row, start, min(start + self.length, end), ends, order)
        return rows.batch(np.full(self._share.rows, step == 0), packed=True)


class RowPlan(NamedTuple):
    """Rows with the same lengths of documents."""

    first: int
    """The number of the first row."""
    rows: int
    content: list[tuple[int, int]]
    """For each length, the first document of the first row among all documents by length, and how many a row has."""


def pack_rows(sizes: Sequence[int], counts: Sequence[int], room: int) -> list[RowPlan]:
    """Pack documents into rows of ``room`` places by first-fit decreasing.

    ``sizes``: the different lengths, ascending, from 1 to ``room``. ``counts``: the number of documents of each. The
    time depends on the number of different lengths, not on that of documents.
    """
    plans: list[RowPlan] = []
    left = dict(zip(sizes, counts))
    following = dict(zip(sizes, np.cumsum([0, *counts]).tolist()))
    available = list(sizes)
    row = 0
    while available:
        space, content, at = room, [], len(available)
        while at := bisect.bisect_right(available, space, hi=at):
            at -= 1
            size = available[at]
            count = min(space // size, left[size])
            content.append((size, count))
            space -= size * count
        rows = min(left[size] // count for size, count in content)
        plans.append(RowPlan(row, rows, [(following[size], count) for size, count in content]))
        row += rows
        for size, count in content:
            left[size] -= rows * count
            following[size] += rows * count
            if not left[size]:
                del available[bisect.bisect_left(available, size)]
    return plans
