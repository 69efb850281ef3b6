"""Where a prompt comes from: files, standard input, words of the command line; as blocks of bytes."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from collections.abc import Iterator, Sequence

from ..terminal import UsageError

BLOCK = 2**16
"""Bytes that are read at once."""
STANDARD_INPUT = "-"


class Text:
    """The files one after the other, exactly as they are, and then the words with a space between; nothing is added."""

    def __init__(self, files: Sequence[str], words: Sequence[str], option: str = "--file") -> None:
        """``option``: the one that named the files. Raises ``UsageError`` for a file that cannot be read."""
        self.words = os.fsencode(" ".join(words))
        self.read = 0
        """Bytes that were handed out."""
        self.files, self.option = list(files), option
        if self.files.count(STANDARD_INPUT) > 1:
            raise UsageError("--file -: standard input can be read once")
        sizes = [self._size(name) for name in files]
        self.size = None if None in sizes else sum(filter(None, sizes)) + len(self.words)
        """Bytes in all; ``None`` where that is seen at the end alone."""

    def __iter__(self) -> Iterator[bytes]:
        for name in self.files:
            with self._reporting(name), _opened(name) as file:
                # whatever is there: a pipe is not waited for until a block is full
                while block := file.read1(BLOCK):
                    self.read += len(block)
                    yield block
        self.read += len(self.words)
        if self.words:
            yield self.words

    def _size(self, name: str) -> int | None:
        if name == STANDARD_INPUT:
            return None
        with self._reporting(name):
            found = os.stat(name)
            if stat.S_ISDIR(found.st_mode):
                raise UsageError(f"{self.option} {name}: a folder; expected a file")
            if not stat.S_ISREG(found.st_mode):  # a pipe, which opening would wait for
                return None
            with open(name, "rb"):
                return found.st_size

    @contextlib.contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.option} {name}: {getattr(error, 'strerror', None) or error}") from None


@contextlib.contextmanager
def _opened(name: str) -> Iterator[io.BufferedReader]:
    if name == STANDARD_INPUT:
        if sys.stdin is None:
            raise UsageError("standard input is closed: give a prompt or --file FILE")
        assert isinstance(sys.stdin.buffer, io.BufferedReader)
        yield sys.stdin.buffer
        return
    with open(name, "rb") as file:
        yield file
