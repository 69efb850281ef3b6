"""Documents in files: text files, JSON lines and parquet, and the first two also compressed with gzip."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from ...registry import Problem, RecipeError, nearest, show
from ..extras import from_extra
from .files import TextFile, changed, label, unreadable

BLOCK = 2**20
"""Bytes that are tokenized at once. A block ends with a line if it contains one."""
LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)


def is_text(file: TextFile) -> bool:
    """Whether a file is one document, byte for byte."""
    return not file.lines and not file.path.name.lower().endswith((*LINES, *PARQUET, ".gz"))


def has_records(file: TextFile) -> bool:
    """Whether every record or line of a file is a document."""
    return file.lines or file.path.name.lower().removesuffix(".gz").endswith((*LINES, *PARQUET))


def documents_in(file: TextFile, field: str) -> Iterator[Iterable[bytes]]:
    """The documents of a file, each in blocks of UTF-8. ``field``: of a record, its text.

    Raises ``RecipeError`` with the file and the line of what is no record with such a field, and ``UsageError`` if a
    package is missing.
    """
    if file.path.name.lower().endswith(PARQUET):
        yield from _rows(file, field)
    elif file.lines:
        with _opened(file) as stream:
            yield from ([text] for line in stream if (text := line.rstrip(b"\r\n")).strip())
    elif has_records(file):
        yield from _lines(file, field)
    else:
        yield _blocks(file)


@contextlib.contextmanager
def _opened(file: TextFile) -> Iterator[Any]:
    """The content of a file, uncompressed, as a stream."""
    try:
        with open(file.path, "rb") as raw:
            if os.fstat(raw.fileno()).st_size != file.size:
                raise changed(file)
            yield gzip.GzipFile(fileobj=raw) if file.path.name.lower().endswith(".gz") else raw
            if os.fstat(raw.fileno()).st_size != file.size:
                raise changed(file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _problem(str(file.path), f"not a complete gzip file: {error}") from None
    except OSError as error:
        raise RecipeError([unreadable(file.path, error)], "data") from None


def _lines(file: TextFile, field: str) -> Iterator[list[bytes]]:
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _problem(f"{file.path}:{number}", f"expected a JSON object in every line: {error}") from None
            if not isinstance(record, dict):
                raise _problem(f"{file.path}:{number}", f"expected a JSON object in every line, got {show(record)}")
            yield [_text(f"{file.path}:{number}", record.get(field), field, record)]


def _rows(file: TextFile, field: str) -> Iterator[list[bytes]]:
    package = from_extra("pyarrow.parquet", "data", "a parquet file")
    try:
        with package.ParquetFile(file.path) as parquet:
            columns = parquet.schema_arrow.names
            if field not in columns:
                raise _problem(str(file.path), _no_field(field, columns))
            row = 0
            for batch in parquet.iter_batches(columns=[field], batch_size=1024):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield [_text(f"{file.path}: row {row}", value, field, columns)]
    except OSError as error:
        raise RecipeError([unreadable(file.path, error)], "data") from None
    except RecipeError:
        raise
    except ValueError as error:  # pyarrow's errors are subclasses
        raise _problem(str(file.path), f"not a parquet file: {show(str(error), 150)}") from None


def _text(place: str, value: Any, field: str, known: Iterable[str]) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    got = f"{field}: expected text, got {show(value)}" if field in known else _no_field(field, known)
    raise _problem(place, got)


def _no_field(field: str, known: Iterable[str]) -> str:
    names = [str(name) for name in known]
    there = show(", ".join(names), 200).strip("'") or "none"
    return f"there is no field {show(field)}{nearest(field, names)} (fields: {there}); `field:` names that of the text"


def _blocks(file: TextFile) -> Iterator[bytes]:
    """A file in blocks of at most ``BLOCK`` bytes that end with a line, or at least with a whole character."""
    with _opened(file) as stream:
        held = b""
        while True:
            held += stream.read(BLOCK + 1 - len(held))  # one byte more tells whether this is the last block
            if len(held) <= BLOCK:
                break
            block = held[:BLOCK]
            block = block[: block.rfind(b"\n") + 1 or _last_character(block)]
            yield block
            held = held[len(block) :]
        if held:
            yield held


def _last_character(block: bytes) -> int:
    """The start of the last character, which may continue after the block; the block's end if it is not UTF-8."""
    for back in range(1, min(4, len(block)) + 1):
        if block[-back] & 0xC0 != 0x80:
            return len(block) - back or len(block)
    return len(block)


def _problem(place: str, message: str) -> RecipeError:
    return RecipeError([Problem(label(place), message)], "data")
