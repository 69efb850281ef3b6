"""``Text``: what a user may say about text, and the source that it opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ...registry import Problem, RecipeError
from .documents import Bytes, Documents, fingerprint, spans_of, store
from .files import find, standard_library
from .packing import PackedOrderedText, PackedText
from .records import has_records, is_text
from .source import Share, Split
from .tokenizer import BYTES, read_tokenizer
from .windows import OrderedText, ShuffledText, TextSource

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
    pack: Annotated[
        Literal["documents"] | None,
        Field(description="documents: rows hold several documents, each from a fresh state; null: no packing"),
    ] = None
    lines: Annotated[bool, Field(description="each line of a text file is a document")] = False
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
        if self.lines:
            files = [file._replace(lines=not has_records(file)) for file in files]
        tokenizer = None if self.tokenizer in (None, BYTES) else read_tokenizer(str(self.tokenizer))
        documents: Documents
        if tokenizer is None and all(map(is_text, files)):
            documents = Bytes(files)
        else:
            documents = store(files, tokenizer, self.field, self.cache)
        spans, held_out = spans_of(split, documents, self.valid, self.test)
        kinds = (ShuffledText, PackedText), (OrderedText, PackedOrderedText)
        kind = kinds[self.documents == "ordered"][self.pack is not None]
        source: TextSource = kind(documents, spans, length=self.length, share=share, split=split, seed=seed)
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
            "pack": self.pack,
            "documents_cut": source.cut,
            "windows": source.windows,
            "padded": source.padded,
            "padded_share": source.padded / (source.windows * self.length),
            "tokens": int(spans.lengths.sum()),
        }
        return source
