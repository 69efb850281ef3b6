"""Text as tokens of a ``tokenizers`` file: made once, kept in a cache folder, and mapped into memory from there."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.cpu_runtime.build_cache import folder as cache_folder
from ...recipes.atomic_write import atomic_write
from ...registry import Problem, RecipeError, nearest, show
from ..randomness import Integers
from .files import TextFile, read

BLOCK = 2**20
"""Bytes that are tokenised at once; a block ends with a line where there is one in it."""
_FORMAT = "titans-build tokens 1"
_END = struct.Struct("<qqq")


class Tokenised:
    """Documents in one file: all tokens, where each document ends, and how many there are of both.

    The tokens are mapped into memory: what is read is loaded, and no more of it is kept than there is room for.
    """

    def __init__(self, path: Path, files: list[TextFile], vocab: int, digest: str) -> None:
        self.vocab = vocab
        self.names = [file.name for file in files]
        self._digest = digest
        kind = _kind(vocab)
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - _END.size))
            tail = file.read()
            count, tokens, width = _END.unpack(tail) if len(tail) == _END.size else (0, 0, 0)
            if (count, width) != (len(files), kind.itemsize) or size != tokens * width + 8 * count + _END.size:
                raise ValueError("cut short")
            file.seek(tokens * width)
            ends = np.frombuffer(file.read(8 * count), "<i8").astype(np.int64)
        self.lengths: Integers = np.diff(ends, prepend=0)
        self._starts = ends - self.lengths
        self._tokens = np.memmap(path, kind, "r", shape=(tokens,)) if tokens else np.zeros(0, kind)

    def read(self, document: int, start: int, stop: int) -> NDArray[Any]:
        first = int(self._starts[document])
        return self._tokens[first + start : first + stop]

    def describe(self) -> dict[str, Any]:
        return {"tokens_are": "tokenizer", "tokenizer_hash": self._digest}


def tokenised(files: list[TextFile], tokenizer: str, cache: str | None) -> Tokenised:
    """The files' tokens, from the cache or made now.

    The file in the cache has a name that says all it was made from, so that it is never out of date and any number
    of processes may make it at once. Raises ``RecipeError`` for a tokenizer that is none and a folder that cannot be
    written, ``UsageError`` where the package is missing.
    """
    from ..extras import from_extra  # what writes to a terminal is not loaded with the library

    package = from_extra("tokenizers", "train", "a tokenizer file")
    content = _content(tokenizer)
    digest = hashlib.sha256(content).hexdigest()
    try:
        encoder = package.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the package raises nothing more exact, in words that may be long
        raise _fail(tokenizer, f"not a file of the tokenizers package: {show(str(error), 100)}") from None
    vocab = encoder.get_vocab_size(with_added_tokens=True)
    made_from = [_FORMAT, digest, BLOCK, [(str(file.path), file.size, file.modified) for file in files]]
    name = hashlib.sha256(json.dumps(made_from).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    place = Path(cache) if cache is not None else cache_folder() / "tokens"
    path = place / f"{name}.tokens"
    try:
        if not path.is_file():
            _make(path, files, encoder, vocab)
        try:
            return Tokenised(path, files, vocab, digest)
        except ValueError:  # by a disk that was full, or a copy that was not finished
            _make(path, files, encoder, vocab)
            return Tokenised(path, files, vocab, digest)
    except OSError as error:
        message = f"tokenised text cannot be kept there: {error.strerror or error}; name another folder under `cache`"
        raise _fail(str(place), message) from None


def _content(tokenizer: str) -> bytes:
    path = Path(tokenizer)
    try:
        return path.read_bytes()
    except OSError as error:
        near = nearest(path.name, sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise _fail(tokenizer, f"the tokenizer file cannot be read: {error.strerror or error}{near}") from None


def _make(path: Path, files: list[TextFile], encoder: Any, vocab: int) -> None:
    kind = _kind(vocab)
    path.parent.mkdir(parents=True, exist_ok=True)
    ends, count = [], 0
    with atomic_write(path) as temporary, open(temporary, "wb") as target:
        for file in files:
            for block in _blocks(file):
                # what is no UTF-8 is read as U+FFFD: a tokenizer knows text alone
                tokens = encoder.encode(block.decode("utf-8", "replace"), add_special_tokens=False).ids
                target.write(np.array(tokens, kind).tobytes())
                count += len(tokens)
            ends.append(count)
        target.write(np.array(ends, "<i8").tobytes())
        target.write(_END.pack(len(files), count, kind.itemsize))


def _blocks(file: TextFile) -> Iterator[bytes]:
    """The file in blocks of about ``BLOCK`` bytes that end with a line, or at least with a whole character."""
    start = 0
    while start < file.size:
        block = read(file, start, min(start + BLOCK, file.size))
        if start + len(block) < file.size:
            end = block.rfind(b"\n") + 1 or _last_character(block)
            block = block[:end]
        start += len(block)
        yield block


def _last_character(block: bytes) -> int:
    """Where the last character begins, which may go on in what follows; of what is no UTF-8, all is taken."""
    for back in range(1, min(4, len(block)) + 1):
        if block[-back] & 0xC0 != 0x80:
            return len(block) - back or len(block)
    return len(block)


def _kind(vocab: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab <= 2**16 else np.dtype("<u4")


def _fail(place: str, message: str) -> RecipeError:
    return RecipeError([Problem(show(place, 200).strip("'"), message)], "data")
