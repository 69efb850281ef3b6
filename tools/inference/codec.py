"""Between text and token ids, both as streams: bytes, numbers, or what a file of the ``tokenizers`` package says."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...registry import show
from ..extras import from_extra
from ..terminal import UsageError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

MOST_HELD = 64
"""Tokens that may wait for the rest of a letter; more than any letter needs."""


class Decoder(Protocol):
    """One stream of tokens that becomes text."""

    def feed(self, token: int) -> str:
        """The text that ``token`` completes, which may be none."""

    def finish(self) -> str:
        """What was left incomplete, as text."""


class Codec(Protocol):
    """One way to write text in token ids."""

    name: str
    size: int | None
    """Ids it makes are below this; ``None`` where that is not known."""

    def encode(self, text: Iterable[bytes]) -> Iterator[Tensor]:
        """Blocks of a text -> int64 ``[time]`` each, in constant memory. Raises ``UsageError`` for what is no text."""

    def decoder(self) -> Decoder:
        """Of a new stream."""


class Bytes:
    """A token is a byte, whatever the bytes are."""

    name = "bytes"
    size: int | None = 256

    def encode(self, text: Iterable[bytes]) -> Iterator[Tensor]:
        """See ``Codec``."""
        for block in text:
            yield torch.frombuffer(bytearray(block), dtype=torch.uint8).long() if block else torch.empty(0).long()

    def decoder(self) -> Decoder:
        """Of UTF-8; what is none becomes U+FFFD."""
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        # a model may have more ids than there are bytes
        return self.utf8.decode(bytes([token])) if token < 256 else self.finish() + REPLACEMENT

    def finish(self) -> str:
        rest = self.utf8.decode(b"", final=True)
        self.utf8.reset()
        return rest


class Numbers:
    """A token is a number, with spaces or lines between: for models that were trained on no text."""

    name = "ids"
    size: int | None = None

    def encode(self, text: Iterable[bytes]) -> Iterator[Tensor]:
        """See ``Codec``."""
        held = b""
        for block in text:
            words = (held + block).split()
            # the last number may go on in the next block
            held = words.pop() if words and not (held + block)[-1:].isspace() else b""
            yield self._ids(words)
        yield self._ids([held] if held else [])

    def _ids(self, words: list[bytes]) -> Tensor:
        for word in words:
            if not (word.isdigit() and len(word) < 19):
                raise UsageError(f"--tokenizer ids: expected token ids >= 0, got {show(word.decode(errors='replace'))}")
        return torch.tensor([int(word) for word in words], dtype=torch.int64)

    def decoder(self) -> Decoder:
        """Numbers with a space between."""
        return _NumberDecoder()


class _NumberDecoder:
    def __init__(self) -> None:
        self.between = ""

    def feed(self, token: int) -> str:
        between, self.between = self.between, " "
        return f"{between}{token}"

    def finish(self) -> str:
        return ""


class Tokenizer:
    """What a ``tokenizer.json`` says. A long text is cut after line ends, and each part is tokenised on its own."""

    def __init__(self, path: Path) -> None:
        package = from_extra("tokenizers", "train", f"--tokenizer {path}")
        try:
            self.tokenizer: Any = package.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--tokenizer {path}: {error.strerror or error}") from None
        except Exception as error:  # the package raises nothing narrower
            raise UsageError(f"--tokenizer {path}: expected a file of the tokenizers package: {error}") from None
        self.name = str(path)
        self.size: int | None = self.tokenizer.get_vocab_size()

    def encode(self, text: Iterable[bytes]) -> Iterator[Tensor]:
        """See ``Codec``; what is no UTF-8 becomes U+FFFD."""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        held = ""
        for block in text:
            held += utf8.decode(block)
            # after the last line, or in a text without any after the last word, or else anywhere
            end = max(held.rfind("\n") + 1, held.rfind(" ") if "\n" not in held else 0) or len(held)
            ready, held = held[:end], held[end:]
            yield self._ids(ready)
        yield self._ids(held + utf8.decode(b"", final=True))

    def _ids(self, text: str) -> Tensor:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids if text else []
        return torch.tensor(ids, dtype=torch.int64)

    def decoder(self) -> Decoder:
        """Of the tokenizer's own text."""
        return _TokenizerDecoder(self.tokenizer)


class _TokenizerDecoder:
    """A token's text depends on those before it (a space) and may need those after it (the rest of a letter)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.before: list[int] = []
        self.held: list[int] = []

    def feed(self, token: int) -> str:
        self.held.append(token)
        text = self._text()
        return "" if text.endswith(REPLACEMENT) and len(self.held) < MOST_HELD else self._settle(text)

    def finish(self) -> str:
        return self._settle(self._text())

    def _settle(self, text: str) -> str:
        self.before, self.held = self.held or self.before, []
        return text

    def _text(self) -> str:
        known = self.tokenizer.decode(self.before, skip_special_tokens=False)
        return str(self.tokenizer.decode(self.before + self.held, skip_special_tokens=False))[len(known) :]


def open_codec(name: str, vocab: int) -> Codec:
    """``bytes``, ``ids`` or the name of a file, for a model of ``vocab`` token ids. Raises ``UsageError``."""
    codec: Codec = Bytes() if name == "bytes" else Numbers() if name == "ids" else Tokenizer(Path(name))
    if codec.size is not None and codec.size > vocab:
        numbers = "; --tokenizer ids reads and writes numbers" if name == "bytes" else ""
        raise UsageError(
            f"--tokenizer {name}: {codec.size:,} token ids are more than the model's vocabulary of {vocab:,}{numbers}"
        )
    return codec
