"""Documents as numbered rows of tokens, of which any part can be read without the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...registry import Problem, RecipeError
from ..randomness import Integers, key_of
from .files import TextFile, read
from .source import Split

FEW = 5
"""Whole documents are held out where at least so many are to be expected in a split; otherwise, ends of documents."""


LOOKED_AT, LOOK = 256, 1024
"""Documents that a fingerprint looks into at most, and tokens that it reads at each place of them."""


class Documents(Protocol):
    """Texts by number."""

    @property
    def vocab(self) -> int:
        """Tokens are from 0 to ``vocab - 1``."""

    @property
    def lengths(self) -> Integers:
        """[documents] tokens of each."""

    @property
    def names(self) -> Sequence[str]:
        """By which whole documents are held out."""

    def read(self, document: int, start: int, stop: int) -> NDArray[Any]:
        """Tokens ``start`` to ``stop`` of a document, any integer dtype."""

    def describe(self) -> dict[str, Any]:
        """What they are, as JSON."""


class Bytes:
    """Files as they are: every byte is a token. Nothing is held but the files' names and sizes."""

    vocab = 256

    def __init__(self, files: list[TextFile]) -> None:
        self.files = files
        self.names = [file.name for file in files]
        self.lengths = np.array([file.size for file in files], np.int64)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.uint8]:
        return np.frombuffer(read(self.files[document], start, stop), np.uint8)

    def describe(self) -> dict[str, Any]:
        return {"tokens_are": "bytes"}


class Spans(NamedTuple):
    """Parts of documents, laid end to end."""

    documents: Integers
    starts: Integers
    stops: Integers

    @property
    def lengths(self) -> Integers:
        """[spans] tokens of each."""
        return self.stops - self.starts


def spans_of(split: Split, documents: Documents, valid: float, test: float) -> tuple[Spans, str]:
    """The parts of the documents that belong to a split, and what was held out for the others, in words.

    Of many documents whole ones are held out, chosen by a hash of their names alone: the same ones whatever the seed,
    and also after others have come. Of few, the ends are: the last share for ``test``, what stands before for
    ``valid``. No token belongs to two splits. Raises ``RecipeError`` when there is none in this one.
    """
    count = len(documents.lengths)
    shares = [share for share in (valid, test) if share]
    if not shares or count * min(shares) >= FEW:
        held = "documents by the hash of their names" if shares else "nothing"
        draw = np.array([key_of("held out", name) / 2**64 for name in documents.names])
        where = {"test": draw < test, "valid": (draw >= test) & (draw < test + valid), "train": draw >= test + valid}
        chosen = np.flatnonzero(where[split])
        spans = Spans(chosen, np.zeros_like(chosen), documents.lengths[chosen])
    else:
        held = "the ends of documents"
        to_test = documents.lengths - np.floor(documents.lengths * test).astype(np.int64)
        to_valid = to_test - np.floor(documents.lengths * valid).astype(np.int64)
        bounds = {"train": (0 * to_valid, to_valid), "valid": (to_valid, to_test), "test": (to_test, documents.lengths)}
        spans = Spans(np.arange(count), *bounds[split])
    # a part of a single token has nothing to predict, nor anything to predict it from
    spans = Spans(*(part[spans.lengths > 1] for part in spans))
    if not len(spans.documents):
        share = {"train": 1 - valid - test, "valid": valid, "test": test}[split]
        message = f"a share of {share:g} of {int(documents.lengths.sum())} tokens leaves no text for this split"
        raise RecipeError([Problem(split, message)], "data")
    return spans, held


def fingerprint(documents: Documents) -> str:
    """Changes when a document comes, goes, or has another name or number of tokens.

    Also when others stand at the beginnings, middles and ends of documents, as far as these are looked at: reading all
    of a large text would take long.
    """
    looked_at = hashlib.sha256()
    for document in range(0, len(documents.lengths), -(-len(documents.lengths) // LOOKED_AT) or 1):
        length = int(documents.lengths[document])
        for start in sorted({0, max(length // 2 - LOOK // 2, 0), max(length - LOOK, 0)}):
            tokens = documents.read(document, start, min(start + LOOK, length))
            looked_at.update(np.asarray(tokens, "<i8").tobytes())
    content = looked_at.hexdigest()
    return f"{key_of(*documents.names, *documents.lengths.tolist(), documents.vocab, content):016x}"
