"""docs/swapping.md shows the table that its first example prints, and names every adapter."""

from __future__ import annotations

import re

import pytest
from pages import PAGES, fences

from titans_build.tools.swapping import ADAPTERS

PAGE = PAGES["swapping.md"].read_text(encoding="utf-8")


def test_the_table_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(fences(PAGE, "python")[0], "swapping.md", "exec", dont_inherit=True), {"__name__": "page"})
    (shown,) = re.findall(r"^```\n(TransformerEncoder: .*?)^```$", PAGE, flags=re.M | re.S)
    assert capsys.readouterr().out == shown


def test_every_adapter_is_named() -> None:
    assert set(ADAPTERS) <= set(re.findall(r"`(\w+)`", PAGE))
