"""docs/swapping.md shows the table that its first example prints, and names every adapter."""

from __future__ import annotations

import re
from typing import Any

import pytest

from titans_build.tools.swapping import ADAPTERS

PAGE = "swapping.md"


def test_the_table_is_what_is_printed(page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(page.fences("python")[0], "swapping.md", "exec", dont_inherit=True), {"__name__": "page"})
    (shown,) = re.findall(r"^```\n(TransformerEncoder: .*?)^```$", page.text, flags=re.M | re.S)
    assert capsys.readouterr().out == shown


def test_every_adapter_is_named(page: Any) -> None:
    assert set(ADAPTERS) <= set(re.findall(r"`(\w+)`", page.text))
