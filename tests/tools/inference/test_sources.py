"""Prompts are read as they are: files, standard input, words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from titans_build.tools.inference.sources import BLOCK, Text
from titans_build.tools.terminal import UsageError


def test_files_and_then_words_with_nothing_added(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xffa\r\n")
    (tmp_path / "b").write_bytes(b"")
    text = Text([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a")], ["two", "words"])
    assert text.size == 17
    assert b"".join(text) == b"\xffa\r\n\xffa\r\ntwo words"
    assert text.read == 17


def test_words_that_are_no_unicode() -> None:
    assert b"".join(Text([], [os.fsdecode(b"caf\xe9")])) == b"caf\xe9"


def test_long_files_come_in_blocks(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * (2 * BLOCK + 1))
    sizes = [len(block) for block in Text([str(tmp_path / "long")], [])]
    assert sum(sizes) == 2 * BLOCK + 1 and max(sizes) <= BLOCK


def test_the_size_of_standard_input_is_not_known() -> None:
    assert Text(["-"], ["x"]).size is None
    assert Text([], []).size == 0 and list(Text([], [])) == []


def test_files_that_cannot_be_read_are_refused_before_any_is(tmp_path: Path) -> None:
    for names, fragment in (
        ([str(tmp_path / "none")], "none: No such file"),
        ([str(tmp_path)], "a folder; expected a file"),
        (["-", "-"], "standard input can be read once"),
        (["\0"], "--file \0: embedded null byte"),
    ):
        with pytest.raises(UsageError) as refused:
            Text(names, [])
        assert fragment in str(refused.value)
