"""docs/python.md is what the signatures and docstrings say now, and has every public name."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import titans_build as tb

PAGE = "python.md"


def test_the_page_is_current_and_complete(page: Any, root: Path) -> None:
    script = runpy.run_path(str(root / "docs" / "make_python_api.py"))
    assert script["page"]() == page.text, "a signature or docstring has changed: python docs/make_python_api.py"
    named = {name.removeprefix("tb.") for names in script["SECTIONS"].values() for name in names}
    assert set(tb.__all__) - script["WITHOUT_SECTION"] <= named
    # nothing of the docstrings' marks is left
    assert "``" not in page.text.replace("```", "") and ":meth:" not in page.text and " at 0x" not in page.text
