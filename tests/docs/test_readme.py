"""The README: its commands run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from titans_build.tools.cli import main

PAGE = "/README.md"


def test_the_commands_run(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, _ = page.fences("yaml")
    Path("my.yaml").write_text(recipe, encoding="utf-8")
    Path("README.md").write_text(page.text[:200], encoding="utf-8")  # a short text to try
    shown = page.command_lines("titans-build")
    shown += [
        line.split()[1:] for line in re.findall(r"`(titans-build (?:list|desc|schema|kern|diag)[^`]*)`", page.text)
    ]
    assert len(shown) >= 11
    for words in shown:
        assert main(words) == 0, (words, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["/README.md", "development.md"])
def test_make_knows_the_targets(name: str, root: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    text = (root / "README.md" if name == "/README.md" else root / "docs" / name).read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([\w-]+)`", text)) | set(re.findall(r"^make ([\w-]+)", text, flags=re.M))
    assert targets >= {"demo", "test"}
    done = subprocess.run(["make", "--dry-run", *targets], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_folders_of_the_layout_exist(root: Path) -> None:
    text = (root / "docs" / "development.md").read_text(encoding="utf-8")
    folders = re.findall(r"^\| `(\w+)/` \|", text, flags=re.M)
    assert len(folders) == 8 and all((root / folder).is_dir() for folder in folders)
