"""Documents as tokens, bytes or those of a tokenizer, of which any part can be read without the rest."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.cpu_runtime.build_cache import folder as cache_folder
from ...recipes.atomic_write import atomic_write
from ...registry import Problem, RecipeError
from ..randomness import Integers, key_of
from .files import TextFile, label, read
from .records import BLOCK, documents_in, has_records
from .source import Split
from .tokenizer import TokenizerFile

FEW = 5
"""Whole documents are held out if at least so many are expected in each split, otherwise the ends of documents."""
SAMPLED_DOCUMENTS, SAMPLED_TOKENS = 256, 1024
"""Documents that a fingerprint samples at most, and tokens at each of their sampled positions."""
_FORMAT = "titans-build tokens 2"
_END = struct.Struct("<qqqq")


class Bytes:
    """Files whose bytes are the tokens. Only their names and sizes are held in memory.

    ``lengths``: [documents] tokens of each. ``names``: by which documents are held out.
    """

    vocab = 256

    def __init__(self, files: list[TextFile]) -> None:
        self.files = files
        self.names = [file.name for file in files]
        self.lengths: Integers = np.array([file.size for file in files], np.int64)

    def read(self, document: int, start: int, stop: int) -> NDArray[Any]:
        """Tokens ``start`` to ``stop`` of a document."""
        return np.frombuffer(read(self.files[document], start, stop), np.uint8)

    def describe(self) -> dict[str, Any]:
        """What the tokens are, as JSON."""
        return {"tokens_are": "bytes"}


class Spans(NamedTuple):
    """Parts of documents, laid end to end; each field is [spans]."""

    documents: Integers
    starts: Integers
    stops: Integers

    @property
    def lengths(self) -> Integers:
        """[spans] tokens of each."""
        return self.stops - self.starts


def spans_of(split: Split, documents: Documents, valid: float, test: float) -> tuple[Spans, str]:
    """The parts of the documents that belong to a split, and in words what was held out for the others.

    Of many documents whole ones are held out, chosen by a hash of their names: the same ones for every seed, and after
    documents have been added. Of few, the ends are: the last share for ``test``, the one before it for ``valid``. No
    token belongs to two splits. Raises ``RecipeError`` if this split has no token.
    """
    count = len(documents.lengths)
    shares = [share for share in (valid, test) if share]
    if not shares or count * min(shares) >= FEW:
        held_out = "documents by the hash of their names" if shares else "nothing"
        draw = np.array([key_of("held out", name) / 2**64 for name in documents.names])
        where = {"test": draw < test, "valid": (draw >= test) & (draw < test + valid), "train": draw >= test + valid}
        chosen = np.flatnonzero(where[split])
        spans = Spans(chosen, np.zeros_like(chosen), documents.lengths[chosen])
    else:
        held_out = "the ends of documents"
        to_test = documents.lengths - np.floor(documents.lengths * test).astype(np.int64)
        to_valid = to_test - np.floor(documents.lengths * valid).astype(np.int64)
        bounds = {"train": (0 * to_valid, to_valid), "valid": (to_valid, to_test), "test": (to_test, documents.lengths)}
        spans = Spans(np.arange(count), *bounds[split])
    # a span of a single token has no target
    spans = Spans(*(part[spans.lengths > 1] for part in spans))
    if int(documents.lengths.max(initial=0)) < 2:
        raise RecipeError([Problem("text", "there is nothing to predict: no document has two tokens")], "data")
    if not len(spans.documents):
        share = {"train": 1 - valid - test, "valid": valid, "test": test}[split]
        message = f"a share of {share:g} of {int(documents.lengths.sum())} tokens leaves no text for this split"
        raise RecipeError([Problem(split, message)], "data")
    return spans, held_out


def fingerprint(documents: Documents) -> str:
    """A hash of the documents' names and lengths, and of samples of their tokens.

    The samples are from the beginnings, middles and ends of some documents: reading a large text would take long.
    """
    samples = hashlib.sha256()
    for document in range(0, len(documents.lengths), -(-len(documents.lengths) // SAMPLED_DOCUMENTS) or 1):
        length = int(documents.lengths[document])
        for start in sorted({0, max(length // 2 - SAMPLED_TOKENS // 2, 0), max(length - SAMPLED_TOKENS, 0)}):
            tokens = documents.read(document, start, min(start + SAMPLED_TOKENS, length))
            samples.update(np.asarray(tokens, "<i8").tobytes())
    content = samples.hexdigest()
    return f"{key_of(*documents.names, *documents.lengths.tolist(), documents.vocab, content):016x}"


# -- tokens in a file --------------------------------------------------------------------------------------------------


class Stored:
    """Documents in one memory-mapped file: all tokens, where each document ends, documents of each file, and counts."""

    def __init__(self, path: Path, files: list[TextFile], tokenizer: TokenizerFile | None) -> None:
        self.vocab = Bytes.vocab if tokenizer is None else tokenizer.size
        self._tokenizer = tokenizer
        dtype = _token_dtype(self.vocab)
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - _END.size))
            tail = file.read()
            count, tokens, width, self._bytes = _END.unpack(tail) if len(tail) == _END.size else (0, 0, 0, 0)
            numbers = count + len(files)
            if width != dtype.itemsize or size != tokens * width + 8 * numbers + _END.size:
                raise ValueError("cut short")
            file.seek(tokens * width)
            ends, counts = np.split(np.frombuffer(file.read(8 * numbers), "<i8").astype(np.int64), [count])
        self.names = [
            f"{file.name}:{number}" if has_records(file) else file.name
            for file, many in zip(files, counts.tolist())
            for number in range(1, many + 1)
        ]
        self.lengths: Integers = np.diff(ends, prepend=0)
        self._starts = ends - self.lengths
        self._tokens = np.memmap(path, dtype, "r", shape=(tokens,)) if tokens else np.zeros(0, dtype)

    def read(self, document: int, start: int, stop: int) -> NDArray[Any]:
        first = int(self._starts[document])
        return self._tokens[first + start : first + stop]

    def describe(self) -> dict[str, Any]:
        if self._tokenizer is None:
            return {"tokens_are": "bytes"}
        rate = self._bytes / max(len(self._tokens), 1)
        return {"tokens_are": "tokenizer", "tokenizer_hash": _digest(self._tokenizer), "bytes_per_token": rate}


Documents = Bytes | Stored


def store(files: list[TextFile], tokenizer: TokenizerFile | None, field: str, cache: str | None) -> Stored:
    """The files' documents as tokens, or bytes if ``tokenizer`` is ``None``, from the cache if it has them.

    ``field``: the field of a record that has its text. The name of the cached file is a hash of everything it was made
    from, so that it is never out of date and several processes may make it at once. Raises ``RecipeError`` for invalid
    files and for a folder that cannot be written.
    """
    records = [field] if any(map(has_records, files)) else []
    records += ["lines"] if any(file.lines for file in files) else []
    digest = None if tokenizer is None else _digest(tokenizer)
    made_from = [_FORMAT, digest, BLOCK, *records, [(str(file.path), file.size, file.modified) for file in files]]
    name = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    folder = Path(cache) if cache is not None else cache_folder() / "tokens"
    path = folder / f"{name}.tokens"
    try:
        if path.is_file():
            try:
                return Stored(path, files, tokenizer)
            except ValueError:  # cut short by a full disk or an unfinished copy
                pass
        _write_tokens(path, files, tokenizer, field)
        return Stored(path, files, tokenizer)
    except OSError as error:
        message = f"tokens cannot be cached there: {error.strerror or error}; name another folder under `cache`"
        raise RecipeError([Problem(label(str(folder)), message)], "data") from None


def _write_tokens(path: Path, files: list[TextFile], tokenizer: TokenizerFile | None, field: str) -> None:
    dtype = _token_dtype(Bytes.vocab if tokenizer is None else tokenizer.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    ends: list[int] = []
    counts: list[int] = []
    tokens = size = 0
    with atomic_write(path) as temporary, open(temporary, "wb") as target:
        for file in files:
            before = len(ends)
            for document in documents_in(file, field):
                for block in document:
                    size += len(block)
                    if tokenizer is not None:
                        # invalid UTF-8 becomes U+FFFD: tokenizers take text only
                        ids = tokenizer.encoder.encode(block.decode("utf-8", "replace"), add_special_tokens=False).ids
                        block = np.array(ids, dtype).tobytes()
                    target.write(block)
                    tokens += len(block) // dtype.itemsize
                ends.append(tokens)
            counts.append(len(ends) - before)
        target.write(np.array([*ends, *counts], "<i8").tobytes())
        target.write(_END.pack(len(ends), tokens, dtype.itemsize, size))


def _digest(tokenizer: TokenizerFile) -> str:
    return hashlib.sha256(tokenizer.text.encode()).hexdigest()


def _token_dtype(vocab: int) -> np.dtype[Any]:
    return np.dtype("u1" if vocab <= 2**8 else "<u2" if vocab <= 2**16 else "<u4")
