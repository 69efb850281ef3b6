"""docs/state.md lists the laws that there are."""

from __future__ import annotations

import re

from pages import PAGES

from titans_build.blocks.laws import LAWS


def test_every_law_is_on_the_page_in_the_order_of_checking() -> None:
    section = PAGES["state.md"].read_text(encoding="utf-8").partition("## The laws")[2]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.M) == list(LAWS)
