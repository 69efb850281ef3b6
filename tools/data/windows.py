"""Text cut into windows: in random order, or documents in order with the state carried along."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ...blocks.language_model import IGNORED
from ..randomness import Integers, key_of, shuffled
from .documents import Documents, Spans
from .source import Batch, Share, Source, Split


class WholeDocuments(NamedTuple):
    """Documents that are read together, and the share of this process."""

    names: list[str]
    """Of all documents, over all processes."""
    tokens: Integers
    """Targets of each."""
    first: int
    """The document in the first row of this process. Rows after the last document are all padding."""
    batches: Iterator[Batch]


class TextSource(Source):
    """Text cut into windows of ``length`` tokens; an epoch reads each of them."""

    batches: int
    shuffled: str
    """What the seed decides the order of; a part of the key."""
    padded: int
    """Tokens of padding in an epoch."""
    cut = 0
    """Documents longer than a row that are cut into several."""

    def __init__(
        self, documents: Documents, spans: Spans, *, length: int, share: Share, split: Split, seed: int
    ) -> None:
        self.vocab, self.length = documents.vocab, length
        self.description: dict[str, Any] = {}
        self._documents, self._spans, self._share, self._split = documents, spans, share, split
        self._key = key_of(self.shuffled, split, seed)
        self.windows = self._count_windows()
        self.batches = -(-self.windows // share.of)

    def describe(self) -> dict[str, Any]:
        """How the text was opened and split, and its ``fingerprint``, which changes when the files do."""
        return self.description

    @abc.abstractmethod
    def _count_windows(self) -> int:
        """The number of windows; sets ``padded``."""

    def _fill(
        self, rows: RowsBuffer, row: int, start: int, stop: int, ends: Integers, order: Integers | None = None
    ) -> None:
        """Fill a row with places ``start`` to ``stop`` of spans laid end to end in ``order``, which end at ``ends``."""
        at, turn = start, int(np.searchsorted(ends, start, side="right"))
        while at < stop:
            within = at - (int(ends[turn - 1]) if turn else 0)
            count = min(stop, int(ends[turn])) - at
            text = self._read(turn if order is None else int(order[turn]), within, within + count + 1)
            rows.put(row, at - start, text, count, turn)
            at += count
            turn += 1

    def read_whole(self, places: int) -> Iterator[WholeDocuments]:
        """Whole documents in an order that the seed decides, at least one, until their tokens fill ``places``.

        Those of similar length are read together, one in each row, in batches between which the state is carried. Every
        process has the same number of batches.
        """
        order = shuffled(self._key, np.arange(len(self._spans.lengths)), len(self._spans.lengths))
        count = np.searchsorted(np.cumsum(self._spans.lengths[order] - 1), places, side="right")
        chosen = order[: max(int(count), 1)]
        chosen = chosen[np.argsort(-self._spans.lengths[chosen], kind="stable")]
        tokens = self._spans.lengths[chosen] - 1
        share, first = self._share, 0
        rank, world = share.first // share.rows, share.of // share.rows
        while first < len(chosen):
            longest = int(tokens[first])
            # those of short documents have as many tokens as other batches; at most half is padding
            most = share.of * max(1, self.length // longest)
            stop = min(first + most, int(np.searchsorted(-tokens, -(longest // 2), side="right")))
            rows = -(-(stop - first) // world)
            mine = chosen[first:stop][rank * rows : (rank + 1) * rows].tolist()
            names = [self._documents.names[document] for document in self._spans.documents[chosen[first:stop]].tolist()]
            batches = self._batches_of(mine, rows, longest)
            yield WholeDocuments(names, tokens[first:stop], rank * rows, batches)
            first = stop

    def _batches_of(self, spans: list[int], count: int, longest: int) -> Iterator[Batch]:
        for start in range(0, longest, self.length):
            rows = RowsBuffer(count, min(self.length, longest - start))
            for row, span in enumerate(spans):
                if start < self._spans.lengths[span] - 1:
                    text = self._read(span, start, start + self.length + 1)
                    rows.put(row, 0, text, len(text) - 1)
            yield rows.batch(np.full(count, start == 0))

    def _read(self, span: int, start: int, stop: int) -> Any:
        """Tokens ``start`` to ``stop`` of a span, or to its end."""
        first = int(self._spans.starts[span])
        last = int(self._spans.stops[span])
        return self._documents.read(int(self._spans.documents[span]), first + start, min(first + stop, last))


class ShuffledText(TextSource):
    """Windows of the text laid end to end, each once in an epoch, in an order that the seed decides.

    A window may reach from one document into the next; the first token of a document is never a target. The last window
    ends where the text ends, so it repeats a part of the one before it. Only a text that is shorter than a window is
    padded (``mask``). The last batch of an epoch is filled with the first windows of the next. The order is computed
    window by window.
    """

    carries, shuffled = False, "windows"

    def _count_windows(self) -> int:
        self._ends = np.cumsum(self._spans.lengths)
        self._total = int(self._ends[-1])
        self.padded = max(0, self.length - self._total)
        return -(-self._total // self.length)

    def batch(self, index: int) -> Batch:
        """Unrelated rows."""
        rows = RowsBuffer(self._share.rows, self.length)
        for row, window in enumerate(shuffled(self._key, self._share.numbers(index), self.windows).tolist()):
            start = max(0, min(window * self.length, self._total - self.length))
            stop = min(start + self.length, self._total)
            self._fill(rows, row, start, stop, self._ends)
        return rows.batch(np.ones(self._share.rows, bool))


class OrderedText(TextSource):
    """Every row reads documents from beginning to end, and continues in the next batch.

    Documents are put in an order that the seed decides (in other splits than train they keep theirs), cut into windows
    and laid end to end. Each row has an equal part of that line, and is ``fresh`` at the start of its part and of every
    document. A document's last window is padded (``mask``). If the parts are not equal, a row ends with the first
    window of the next part.
    """

    carries, shuffled = True, "documents"

    def _count_windows(self) -> int:
        # a span's last token is only a target
        self._counts = -(-(self._spans.lengths - 1) // self.length)
        self._latest: tuple[int, Integers, Integers] | None = None
        windows = int(self._counts.sum())
        self.padded = windows * self.length - int((self._spans.lengths - 1).sum())
        return windows

    def batch(self, index: int) -> Batch:
        """The next window of each row's part."""
        numbers, step, order, ends = self._parts(index)
        rows = RowsBuffer(self._share.rows, self.length)
        fresh = np.zeros(self._share.rows, bool)
        for row, number in enumerate(numbers):
            window = number * self.windows // self._share.of + step
            place = int(np.searchsorted(ends, window, side="right"))
            span = int(order[place])
            within = window - int(ends[place] - self._counts[span])
            start = within * self.length
            stop = min(start + self.length, int(self._spans.lengths[span]) - 1)
            rows.put(row, 0, self._read(span, start, stop + 1), stop - start)
            fresh[row] = step == 0 or within == 0
        return rows.batch(fresh)

    def _parts(self, index: int) -> tuple[list[int], int, Integers, Integers]:
        """For a batch: the part of each row, its number in the epoch, and the spans as of ``_order``."""
        epoch, step = divmod(index, self.batches)
        return (self._share.numbers(index) - index * self._share.of).tolist(), step, *self._order(epoch)

    def _order(self, epoch: int) -> tuple[Integers, Integers]:
        """The spans in the order of an epoch, and the number of windows up to the end of each."""
        if self._latest is None or self._latest[0] != epoch:
            order = np.arange(len(self._counts))
            if self._split == "train":
                order = shuffled(self._key, epoch * len(order) + order, len(order))
            self._latest = epoch, order, np.cumsum(self._counts[order])
        return self._latest[1:]


class RowsBuffer:
    """A batch being filled, initially all padding."""

    def __init__(self, rows: int, length: int) -> None:
        self.tokens = np.zeros((rows, length), np.int64)
        self.targets = np.full((rows, length), IGNORED, np.int64)
        self.mask = np.zeros((rows, length), bool)
        self.documents = np.zeros((rows, length), np.int64)

    def put(self, row: int, column: int, text: Any, count: int, document: int = 0) -> None:
        """Write ``count`` tokens of ``text``; their targets are the tokens after them in ``text``."""
        self.tokens[row, column : column + count] = text[:count]
        self.targets[row, column : column + len(text) - 1] = text[1:]
        self.mask[row, column : column + count] = True
        self.documents[row, column : column + count] = document

    def batch(self, fresh: Any, *, packed: bool = False) -> Batch:
        return Batch(
            torch.from_numpy(self.tokens),
            torch.from_numpy(self.targets),
            None if self.mask.all() else torch.from_numpy(self.mask),
            torch.from_numpy(fresh),
            torch.from_numpy(self.documents) if packed else None,
        )
