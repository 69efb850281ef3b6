"""docs/state.md lists the laws that there are."""

from __future__ import annotations

import re
from typing import Any

from titans_build.blocks.laws import LAWS

PAGE = "state.md"


def test_all_laws_are_listed_in_order(page: Any) -> None:
    section = page.text.partition("## The laws")[2]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.M) == list(LAWS)
