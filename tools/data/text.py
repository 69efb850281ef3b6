"""Text as a data source: windows in random order, or documents in order with the state carried along."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from ...blocks.language_model import IGNORED
from ...registry import Problem, RecipeError
from ..randomness import Integers, key_of, shuffled
from .documents import Bytes, Documents, Spans, fingerprint, spans_of, store
from .files import find, standard_library
from .records import is_text
from .source import Batch, Share, Source, Split
from .tokenizer import BYTES, read_tokenizer

NAMED = {"stdlib": standard_library}
"""Texts that every machine has, by name. A file of the same name is ``./stdlib``."""


@dataclass(kw_only=True)
class Text:
    """What a user may say about text. Each file is a document; of JSON lines and parquet, each record is one."""

    text: Annotated[str | list[str], Field(description="files, folders, wildcards; or `stdlib`", min_length=1)]
    tokenizer: Annotated[
        str | None, Field(description="a tokenizer.json, or a folder or cached name with one; null: tokens are bytes")
    ] = None
    field: Annotated[str, Field(description="field of a record (JSON lines, parquet) that has the text")] = "text"
    documents: Annotated[
        Literal["shuffled", "ordered"],
        Field(description="windows in random order, or whole documents with the state carried along"),
    ] = "shuffled"
    length: Annotated[int, Field(ge=1, le=2**31, description="tokens of a row")] = 512
    valid: Annotated[float, Field(ge=0, lt=1, description="share held out for validation")] = 0.05
    test: Annotated[float, Field(ge=0, lt=1, description="share held out for the final test")] = 0.05
    cache: Annotated[str | None, Field(description="folder for tokens; null: the user's cache folder")] = None

    def open(self, share: Share, split: Split, seed: int) -> TextSource:
        """The source of a split. Raises ``RecipeError`` for files that cannot be read."""
        if self.valid + self.test >= 1:
            message = f"{self.valid:g} for valid and {self.test:g} for test leave nothing to train on"
            raise RecipeError([Problem("valid", message)], "text")
        patterns = [self.text] if isinstance(self.text, str) else self.text
        files = NAMED[patterns[0]]() if len(patterns) == 1 and patterns[0] in NAMED else find(patterns)
        tokenizer = None if self.tokenizer in (None, BYTES) else read_tokenizer(str(self.tokenizer))
        documents: Documents
        if tokenizer is None and all(map(is_text, files)):
            documents = Bytes(files)
        else:
            documents = store(files, tokenizer, self.field, self.cache)
        spans, held_out = spans_of(split, documents, self.valid, self.test)
        source = (OrderedText if self.documents == "ordered" else ShuffledText)(
            documents, spans, length=self.length, share=share, split=split, seed=seed
        )
        source.tokenizer = None if tokenizer is None else tokenizer.text
        source.description = {
            "text": patterns,
            "tokenizer": self.tokenizer,
            **documents.describe(),
            "vocab": documents.vocab,
            "length": self.length,
            "rows": share.of,
            "split": split,
            "seed": seed,
            "valid": self.valid,
            "test": self.test,
            "held_out": held_out,
            "files": len(files),
            "files_of_this_split": len(set(spans.documents.tolist())),
            "fingerprint": fingerprint(documents),
            "documents": self.documents,
            "windows": source.windows,
            "tokens": int(spans.lengths.sum()),
        }
        return source


class TextSource(Source):
    """Text cut into windows of ``length`` tokens; an epoch reads each of them."""

    batches: int
    shuffled: str
    """What the seed decides the order of; a part of the key."""

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
    def _count_windows(self) -> int: ...

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
        return -(-self._total // self.length)

    def batch(self, index: int) -> Batch:
        """Unrelated rows."""
        rows = _Rows(self._share.rows, self.length)
        for row, window in enumerate(shuffled(self._key, self._share.numbers(index), self.windows)):
            self._fill(rows, row, int(window))
        return rows.batch(np.ones(self._share.rows, bool))

    def _fill(self, rows: _Rows, row: int, window: int) -> None:
        start = max(0, min(window * self.length, self._total - self.length))
        stop = min(start + self.length, self._total)
        column = 0
        span = int(np.searchsorted(self._ends, start, side="right"))
        while start + column < stop:
            within = start + column - int(self._ends[span] - self._spans.lengths[span])
            count = min(stop - start - column, int(self._spans.lengths[span]) - within)
            rows.put(row, column, self._read(span, within, within + count + 1), count)
            column += count
            span += 1


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
        return int(self._counts.sum())

    def batch(self, index: int) -> Batch:
        """The next window of each row's part."""
        numbers = self._share.numbers(index) - index * self._share.of
        epoch, step = divmod(index, self.batches)
        order, ends = self._order(epoch)
        rows = _Rows(self._share.rows, self.length)
        fresh = np.zeros(self._share.rows, bool)
        for row, number in enumerate(numbers.tolist()):
            window = number * self.windows // self._share.of + step
            place = int(np.searchsorted(ends, window, side="right"))
            span = int(order[place])
            within = window - int(ends[place] - self._counts[span])
            start = within * self.length
            stop = min(start + self.length, int(self._spans.lengths[span]) - 1)
            rows.put(row, 0, self._read(span, start, stop + 1), stop - start)
            fresh[row] = step == 0 or within == 0
        return rows.batch(fresh)

    def _order(self, epoch: int) -> tuple[Integers, Integers]:
        """The spans in the order of an epoch, and the number of windows up to the end of each."""
        if self._latest is None or self._latest[0] != epoch:
            order = np.arange(len(self._counts))
            if self._split == "train":
                order = shuffled(self._key, epoch * len(order) + order, len(order))
            self._latest = epoch, order, np.cumsum(self._counts[order])
        return self._latest[1:]


class _Rows:
    """A batch being filled, initially all padding."""

    def __init__(self, rows: int, length: int) -> None:
        self.tokens = np.zeros((rows, length), np.int64)
        self.targets = np.full((rows, length), IGNORED, np.int64)
        self.mask = np.zeros((rows, length), bool)

    def put(self, row: int, column: int, text: Any, count: int) -> None:
        """Write ``count`` tokens of ``text``; their targets are the tokens after them in ``text``."""
        self.tokens[row, column : column + count] = text[:count]
        self.targets[row, column : column + len(text) - 1] = text[1:]
        self.mask[row, column : column + count] = True

    def batch(self, fresh: Any) -> Batch:
        mask = None if self.mask.all() else torch.from_numpy(self.mask)
        return Batch(torch.from_numpy(self.tokens), torch.from_numpy(self.targets), mask, torch.from_numpy(fresh))
