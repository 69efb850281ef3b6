"""The Python standard library's sources: real text that is on any machine."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from ...registry import Problem, RecipeError
from .files import TextFile, text_file

LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__")
"""Folders: what was installed later, tests, which not every distribution brings along, and tables of numbers."""


def standard_library() -> list[TextFile]:
    """Its ``.py`` files, named from its folder. Raises ``RecipeError`` where a Python comes without its sources."""
    root = Path(sysconfig.get_path("stdlib")).resolve()
    found = []
    for folder, folders, files in os.walk(root):
        # config-... and _sysconfigdata... say how this one Python was built
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith((".", "config-"))]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                found.append(text_file(Path(folder, name), root))
    sources = [file for file in found if isinstance(file, TextFile) and file.size]
    if not sources:
        raise RecipeError([Problem("stdlib", f"this Python comes without its sources in {root}")], "data")
    return sorted(sources, key=lambda file: file.name)
