"""Text to token ids and back, both as streams: bytes, ids written as numbers, or a ``tokenizer.json``."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ...registry import show
from ..data.tokenizer import TokenizerFile, parse_tokenizer, read_tokenizer
from ..terminal import UsageError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

MAX_PENDING = 64
"""Tokens that may wait for the rest of a character; more than any character needs."""


Lengths: TypeAlias = Callable[[Tensor], None]
"""Called with int64 ``[time]``: the bytes of text of each token."""


class ByteTokenizer:
    """A token is a byte, whatever the bytes are."""

    name = "bytes"
    size: int | None = 256

    def encode(self, text: Iterable[bytes], on_lengths: Lengths | None = None) -> Iterator[Tensor]:
        for block in text:
            if on_lengths is not None:
                on_lengths(torch.ones(len(block), dtype=torch.int64))
            yield torch.frombuffer(bytearray(block), dtype=torch.uint8).long() if block else torch.empty(0).long()

    def decoder(self) -> ByteDecoder:
        """Decodes UTF-8; invalid bytes become U+FFFD."""
        return ByteDecoder()


class ByteDecoder:
    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        # a model may have more ids than there are bytes
        return self.utf8.decode(bytes([token])) if token < 256 else self.finish() + REPLACEMENT

    def finish(self) -> str:
        rest = self.utf8.decode(b"", final=True)
        self.utf8.reset()
        return rest


class IdTokenizer:
    """A token is a number, separated by whitespace: for models that were not trained on text."""

    name = "ids"
    size: int | None = None

    def encode(self, text: Iterable[bytes], on_lengths: Lengths | None = None) -> Iterator[Tensor]:
        pending = b""
        for block in text:
            words = (pending + block).split()
            # the last number may continue in the next block
            pending = words.pop() if words and not (pending + block)[-1:].isspace() else b""
            yield self._ids(words)
        yield self._ids([pending] if pending else [])

    def _ids(self, words: list[bytes]) -> Tensor:
        for word in words:
            if not (word.isdigit() and len(word) < 19):
                raise UsageError(f"--tokenizer ids: expected token ids >= 0, got {show(word.decode(errors='replace'))}")
        return torch.tensor([int(word) for word in words], dtype=torch.int64)

    def decoder(self) -> Decoder:
        return Decoder(lambda ids: " ".join(map(str, ids)))


class FileTokenizer:
    """The tokenizer of a ``tokenizer.json``. Long text is split after line ends; each part is tokenized on its own."""

    def __init__(self, file: TokenizerFile, name: str) -> None:
        self.tokenizer = file.encoder
        self.name = name
        self.size: int | None = file.size

    def encode(self, text: Iterable[bytes], on_lengths: Lengths | None = None) -> Iterator[Tensor]:
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pending = ""
        for block in text:
            pending += utf8.decode(block)
            # split after the last line end; without one, before the last space; without one, at the end
            end = max(pending.rfind("\n") + 1, pending.rfind(" ") if "\n" not in pending else 0) or len(pending)
            ready, pending = pending[:end], pending[end:]
            yield self._ids(ready, on_lengths)
        yield self._ids(pending + utf8.decode(b"", final=True), on_lengths)

    def _ids(self, text: str, on_lengths: Lengths | None) -> Tensor:
        found = self.tokenizer.encode(text, add_special_tokens=False)
        if on_lengths is not None and found.ids:
            points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
            sizes = 1 + (points >= 0x80).long() + (points >= 0x800) + (points >= 0x10000)
            before = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
            # a token takes what lies between the end of the one before and its own, the last one also the rest
            ends = torch.tensor([end for _, end in found.offsets[:-1]] + [len(text)]).cummax(0).values
            on_lengths(before[ends].diff(prepend=torch.zeros(1, dtype=torch.int64)))
        return torch.tensor(found.ids, dtype=torch.int64)

    def decoder(self) -> Decoder:
        return Decoder(partial(self.tokenizer.decode, skip_special_tokens=False))


class Decoder:
    """A token's text depends on those before it (a space) and may need those after it (the rest of a character)."""

    def __init__(self, text_of: Callable[[list[int]], str]) -> None:
        self.text_of = text_of
        self.previous: list[int] = []
        self.pending: list[int] = []

    def feed(self, token: int) -> str:
        self.pending.append(token)
        text = self._text()
        return "" if text.endswith(REPLACEMENT) and len(self.pending) < MAX_PENDING else self._flush(text)

    def finish(self) -> str:
        return self._flush(self._text())

    def _flush(self, text: str) -> str:
        self.previous, self.pending = self.pending or self.previous, []
        return text

    def _text(self) -> str:
        return self.text_of(self.previous + self.pending)[len(self.text_of(self.previous)) :]


Tokenizer: TypeAlias = ByteTokenizer | IdTokenizer | FileTokenizer
"""One way to write text in token ids, which are all below ``size``; ``None``: not known.

``encode`` takes blocks of a text and yields int64 ``[time]`` blocks of ids, in constant memory. ``on_lengths`` is
called before each block with the bytes of its tokens, if ids stand for text. It raises ``UsageError`` for invalid text.
``decoder()`` decodes a new stream: ``feed(token)`` returns the text that a token completes, which may be empty, and
``finish()`` that of a character which was left incomplete.
"""


def check_ids(ids: Tensor, vocab: int | None, source: str) -> None:
    """Raise ``UsageError``, which begins with ``source``, for ids outside of a model's vocabulary."""
    if vocab is not None and len(ids) and int(ids.max()) >= vocab:
        allowed = f"the model's vocabulary of {vocab:,} (0 to {vocab - 1:,})"
        raise UsageError(f"{source}: token id {int(ids.max())} is outside of {allowed}")


def open_tokenizer(name: str, vocab: int, text: str | None = None) -> Tokenizer:
    """``bytes``, ``ids`` or what ``read_tokenizer`` takes, for a model of ``vocab`` token ids; or, with ``text``, the
    tokenizer of the text of a file with this name. Raises ``UsageError`` and ``RecipeError``.
    """
    tokenizer: Tokenizer
    if text is None and name in ("bytes", "ids"):
        tokenizer = ByteTokenizer() if name == "bytes" else IdTokenizer()
    else:
        tokenizer = FileTokenizer(read_tokenizer(name) if text is None else parse_tokenizer(text, name), name)
    if tokenizer.size is not None and tokenizer.size > vocab:
        hint = "; --tokenizer ids reads and writes numbers" if name == "bytes" else ""
        raise UsageError(
            f"--tokenizer {name}: {tokenizer.size:,} token ids are more than the model's vocabulary of {vocab:,}{hint}"
        )
    return tokenizer
