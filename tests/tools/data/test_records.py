"""Documents in JSON lines, parquet and compressed files."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import titans_build as tb
from titans_build.registry import RecipeError
from titans_build.tools.data.files import find
from titans_build.tools.data.records import documents_in
from titans_build.tools.terminal import UsageError

Write = Callable[..., None]
TEXTS = [f"document {number}: naïve text. " * (3 + number) for number in range(5)]


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def documents(*names: str, field: str = "text") -> list[str]:
    return [b"".join(blocks).decode() for file in find(names) for blocks in documents_in(file, field)]


@pytest.fixture
def files(write: Write) -> None:
    records = [{"id": number, "content": text} for number, text in enumerate(TEXTS)]
    raw = lines(*records[:2]) + "\n" + lines(*records[2:])
    write({"a.jsonl": raw, "b.jsonl.gz": gzip.compress(raw.encode()), "d.txt.gz": gzip.compress(TEXTS[0].encode())})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), "c.parquet")


def test_records_are_documents(files: None) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert documents(name, field="content") == TEXTS
    assert documents("d.txt.gz") == [TEXTS[0]]


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt.gz"])
def test_source_of_records(files: None, write: Write, name: str) -> None:
    """The tokens are those of the same documents in files of their own."""
    texts = TEXTS if name != "d.txt.gz" else TEXTS[:1]
    write({f"plain/{number}.txt": text for number, text in enumerate(texts)})
    given = {"documents": "ordered", "length": 8, "valid": 0, "test": 0}
    a = tb.open_source({"text": name, "field": "content", **given}, rows=1)
    b = tb.open_source({"text": "plain", **given}, rows=1)

    # another order, as the names are others
    def read(source: Any) -> list[list[int]]:
        return sorted(source.batch(index).tokens[0].tolist() for index in range(source.batches))

    assert read(a) == read(b) and a.vocab == 256 and a.describe()["tokens_are"] == "bytes"
    assert tb.open_source(f"{{text: {name}, field: content, length: 4}}", rows=1).length == 4


def test_documents_of_one_file_are_held_out(write: Write) -> None:
    write({"many.jsonl": lines(*({"text": f"text {number}"} for number in range(400)))})
    tokens = [tb.open_source("many.jsonl", rows=1, split=split).describe()["tokens"] for split in ("train", "valid")]
    assert tokens[1] > 50 and tokens[0] > 5 * tokens[1]


def test_lines_are_documents(write: Write) -> None:
    text = "one line\n\n  \nand another\r\nlast"
    write({"a.txt": text, "b.txt.gz": gzip.compress(text.encode()), "c.jsonl": lines({"text": "two\nlines"})})
    given = {"documents": "ordered", "pack": "documents", "lines": True, "length": 64, "valid": 0, "test": 0}
    for name, expected in (("a.txt", 7 + 10 + 3), ("b.txt.gz", 7 + 10 + 3), ("c.jsonl", 8)):
        batch = tb.open_source({"text": name, **given}, rows=1).batch(0)
        assert batch.mask is not None and int(batch.mask.sum()) == expected
        read = bytes(batch.tokens[batch.mask].tolist()).decode()
        assert sorted(read) == sorted("one linand anothelas" if name != "c.jsonl" else "two\nline")
    # without it, a file is one document, and its tokens are others
    assert tb.open_source({"text": "b.txt.gz", **given, "lines": False}, rows=1).describe()["tokens"] == len(text)
    said = tb.open_source({"text": "*", **given}, rows=1).describe()
    assert (said["files_of_this_split"], said["pack"], said["documents_cut"]) == (7, "documents", 0)
    assert said["padded_share"] == said["padded"] / (said["windows"] * 64) > 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": 3}\n', "a.jsonl:3: text: expected text, got 3"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"txt": "y", "id": 1}\n',
            "a.jsonl:2: there is no field 'text'; did you mean 'txt'",
        ),
        ("a.jsonl", '{"text": "x"}\n["y"]\n', r"a.jsonl:2: expected a JSON object in every line, got \['y'\]"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl:2: expected a JSON object in every line: "),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: not a complete gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "a.txt.gz: not a complete gzip file"),
        ("a.parquet", b"no parquet", "a.parquet: not a parquet file"),
    ],
)
def test_invalid_records(write: Write, name: str, content: Any, message: str) -> None:
    write({name: content})
    with pytest.raises(RecipeError, match=message):
        tb.open_source(name, rows=1)


def test_invalid_parquet(files: None) -> None:
    with pytest.raises(RecipeError, match=r"c.parquet: there is no field 'text'.*\(fields: id, content\)"):
        tb.open_source("c.parquet", rows=1)
    with pytest.raises(RecipeError, match=r"c.parquet: row 1: id: expected text, got 0"):
        tb.open_source({"text": "c.parquet", "field": "id"}, rows=1)


def test_missing_package(files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"a parquet file needs pyarrow.*pip install 'titans-build\[data\]'"):
        tb.open_source("c.parquet", rows=1)
