"""Documents as tokens, bytes or those of a tokenizer, of which any part can be read without the rest."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.cpu_runtime.build_cache import folder as cache_folder
from ...recipes.atomic_write import atomic_write
from ...registry import Problem, RecipeError, nearest, show
from ..randomness import Integers, key_of
from .files import TextFile, read
from .source import Split

FEW = 5
"""Whole documents are held out if at least so many are expected in each split, otherwise the ends of documents."""
SAMPLED_DOCUMENTS, SAMPLED_TOKENS = 256, 1024
"""Documents that a fingerprint samples at most, and tokens at each of their sampled positions."""
BLOCK = 2**20
"""Bytes that are tokenized at once. A block ends with a line if it contains one."""
_FORMAT = "titans-build tokens 1"
_END = struct.Struct("<qqq")


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


# -- tokenizers --------------------------------------------------------------------------------------------------------


class Tokenized:
    """Documents in one memory-mapped file: all tokens, where each document ends, and the counts of both."""

    def __init__(self, path: Path, files: list[TextFile], vocab: int, digest: str) -> None:
        self.vocab = vocab
        self.names = [file.name for file in files]
        self._digest = digest
        dtype = _token_dtype(vocab)
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - _END.size))
            tail = file.read()
            count, tokens, width = _END.unpack(tail) if len(tail) == _END.size else (0, 0, 0)
            if (count, width) != (len(files), dtype.itemsize) or size != tokens * width + 8 * count + _END.size:
                raise ValueError("cut short")
            file.seek(tokens * width)
            ends = np.frombuffer(file.read(8 * count), "<i8").astype(np.int64)
        self.lengths: Integers = np.diff(ends, prepend=0)
        self._starts = ends - self.lengths
        self._tokens = np.memmap(path, dtype, "r", shape=(tokens,)) if tokens else np.zeros(0, dtype)

    def read(self, document: int, start: int, stop: int) -> NDArray[Any]:
        first = int(self._starts[document])
        return self._tokens[first + start : first + stop]

    def describe(self) -> dict[str, Any]:
        return {"tokens_are": "tokenizer", "tokenizer_hash": self._digest}


Documents = Bytes | Tokenized


def tokenize(files: list[TextFile], tokenizer: str, cache: str | None) -> Tokenized:
    """The files' tokens, from the cache if it has them.

    The name of the cached file is a hash of everything it was made from, so that it is never out of date and several
    processes may make it at once. Raises ``RecipeError`` for an invalid tokenizer and for a folder that cannot be
    written, and ``UsageError`` if the package is missing.
    """
    from ..extras import from_extra

    package = from_extra("tokenizers", "train", "a tokenizer file")
    content = _read_tokenizer(Path(tokenizer))
    digest = hashlib.sha256(content).hexdigest()
    try:
        encoder = package.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the package raises no narrower class
        raise _problem(tokenizer, f"not a file of the tokenizers package: {show(str(error), 100)}") from None
    vocab = encoder.get_vocab_size(with_added_tokens=True)
    made_from = [_FORMAT, digest, BLOCK, [(str(file.path), file.size, file.modified) for file in files]]
    name = hashlib.sha256(json.dumps(made_from).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    folder = Path(cache) if cache is not None else cache_folder() / "tokens"
    path = folder / f"{name}.tokens"
    try:
        if not path.is_file():
            _write_tokens(path, files, encoder, vocab)
        try:
            return Tokenized(path, files, vocab, digest)
        except ValueError:  # cut short by a full disk or an unfinished copy
            _write_tokens(path, files, encoder, vocab)
            return Tokenized(path, files, vocab, digest)
    except OSError as error:
        message = f"tokens cannot be cached there: {error.strerror or error}; name another folder under `cache`"
        raise _problem(str(folder), message) from None


def _read_tokenizer(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        near = nearest(path.name, sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise _problem(str(path), f"the tokenizer file cannot be read: {error.strerror or error}{near}") from None


def _write_tokens(path: Path, files: list[TextFile], encoder: Any, vocab: int) -> None:
    dtype = _token_dtype(vocab)
    path.parent.mkdir(parents=True, exist_ok=True)
    ends, count = [], 0
    with atomic_write(path) as temporary, open(temporary, "wb") as target:
        for file in files:
            for block in _blocks(file):
                # invalid UTF-8 becomes U+FFFD: tokenizers take text only
                tokens = encoder.encode(block.decode("utf-8", "replace"), add_special_tokens=False).ids
                target.write(np.array(tokens, dtype).tobytes())
                count += len(tokens)
            ends.append(count)
        target.write(np.array(ends, "<i8").tobytes())
        target.write(_END.pack(len(files), count, dtype.itemsize))


def _blocks(file: TextFile) -> Iterator[bytes]:
    """The file in blocks of about ``BLOCK`` bytes that end with a line, or at least with a whole character."""
    start = 0
    while start < file.size:
        block = read(file, start, min(start + BLOCK, file.size))
        if start + len(block) < file.size:
            block = block[: block.rfind(b"\n") + 1 or _last_character(block)]
        start += len(block)
        yield block


def _last_character(block: bytes) -> int:
    """The start of the last character, which may continue after the block; the block's end if it is not UTF-8."""
    for back in range(1, min(4, len(block)) + 1):
        if block[-back] & 0xC0 != 0x80:
            return len(block) - back or len(block)
    return len(block)


def _token_dtype(vocab: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab <= 2**16 else np.dtype("<u4")


def _problem(place: str, message: str) -> RecipeError:
    return RecipeError([Problem(show(place, 200).strip("'"), message)], "data")
