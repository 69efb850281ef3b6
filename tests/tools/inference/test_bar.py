"""The bar of what is being read, for a person who looks."""

from __future__ import annotations

import io
import sys

import pytest

from titans_build.tools.inference.bar import reading_bar
from titans_build.tools.inference.sources import Text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_there_is_a_bar_where_there_is_something_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", seen := Terminal())
    with reading_bar(Text([], []), "reading") as advance:
        advance(0)
    assert seen.getvalue() == ""
    with reading_bar(Text([], ["words"]), "reading") as advance:
        advance(5)
    assert "reading" in seen.getvalue()
