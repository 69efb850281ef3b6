"""Text as a source of batches: what a user may say about it, and what is made of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from .documents import Bytes, Documents, Spans, fingerprint, spans_of
from .files import TextFile, find
from .source import Batch, Share, Split
from .standard_library import standard_library
from .tokens import tokenised
from .windows import Ordered, Shuffled

NAMED: dict[str, Callable[[], list[TextFile]]] = {"stdlib": standard_library}
"""Texts that are on every machine, by name. A file of the same name is ``./stdlib``."""


class Text:
    """Text out of files; each file is a document."""

    def __init__(
        self,
        *,
        text: Annotated[str | list[str], Field(description="files, folders, wildcards; or `stdlib`", min_length=1)],
        tokenizer: Annotated[
            str | None, Field(description="a file of the `tokenizers` package; null: every byte is a token")
        ] = None,
        documents: Annotated[
            Literal["shuffled", "ordered"],
            Field(description="windows in random order, or whole documents with state carried along"),
        ] = "shuffled",
        length: Annotated[int, Field(ge=1, le=2**31, description="tokens of a row")] = 512,
        valid: Annotated[float, Field(ge=0, lt=1, description="share held out to watch training")] = 0.05,
        test: Annotated[float, Field(ge=0, lt=1, description="share held out to the end")] = 0.05,
        cache: Annotated[
            str | None, Field(description="folder for tokenised text; null: the user's cache folder")
        ] = None,
    ) -> None:
        self.patterns = [text] if isinstance(text, str) else text
        self.tokenizer, self.cache = tokenizer, cache
        self.documents: Literal["shuffled", "ordered"] = documents
        self.length, self.valid, self.test = length, valid, test

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """What is wrong between fields."""
        if fields["valid"] + fields["test"] >= 1:
            yield (
                "valid",
                f"with {fields['valid']:g} for valid and {fields['test']:g} for test nothing is left to train on",
            )

    def files(self) -> list[TextFile]:
        """The documents' files."""
        if self.patterns[0] in NAMED and len(self.patterns) == 1:
            return NAMED[self.patterns[0]]()
        return find(self.patterns)

    def open(self, share: Share, split: Split, seed: int) -> TextSource:
        """The source of a split of it."""
        files = self.files()
        documents: Documents = Bytes(files) if self.tokenizer is None else tokenised(files, self.tokenizer, self.cache)
        spans, held_out = spans_of(split, documents, self.valid, self.test)
        return TextSource(self, documents, spans, held_out, share=share, split=split, seed=seed)


class TextSource:
    """Text in rows: shuffled windows, or documents in order with ``carries``."""

    def __init__(
        self, text: Text, documents: Documents, spans: Spans, held_out: str, *, share: Share, split: Split, seed: int
    ) -> None:
        kind = Ordered if text.documents == "ordered" else Shuffled
        self._rows = kind(documents, spans, length=text.length, share=share, split=split, seed=seed)
        self.vocab, self.length, self.carries = documents.vocab, text.length, kind.carries
        self.batches = self._rows.batches
        self._said = {
            "text": text.patterns,
            "tokenizer": text.tokenizer,
            **documents.describe(),
            "vocab": documents.vocab,
            "length": text.length,
            "rows": share.of,
            "split": split,
            "seed": seed,
            "valid": text.valid,
            "test": text.test,
            "held_out": held_out,
            "files": len(documents.names),
            "files_of_this_split": len(set(spans.documents.tolist())),
            "fingerprint": fingerprint(documents),
            **self._rows.describe(),
        }

    def batch(self, index: int) -> Batch:
        """The batch of a number; ``batches`` of them are one round."""
        return self._rows.batch(index)

    def describe(self) -> dict[str, Any]:
        """What was opened, how it was split, and ``fingerprint``, which changes when the files do."""
        return self._said
