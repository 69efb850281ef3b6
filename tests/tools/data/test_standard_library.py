from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from titans_build.registry import RecipeError
from titans_build.tools.data.files import standard_library


def test_standard_library_files():
    files = standard_library()
    names = [file.name for file in files]
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert sum(file.size for file in files) > 5_000_000
    assert names == sorted(names) and all(name.endswith(".py") for name in names)
    left_out = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}
    assert not [name for name in names if left_out & set(name.split("/")) or name.startswith("_sysconfigdata")]


def test_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RecipeError, match="stdlib: this Python has no sources in "):
        standard_library()
