"""All pages of the documentation and the README: code runs, links are valid, commands and pictures are current."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from titans_build.tools import analyze, cli, infer, train


def test_python_code_runs(
    any_page: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_stays_registered: None
) -> None:
    (tmp_path / "docs").symlink_to(root / "docs")  # pages read each other as text
    monkeypatch.chdir(tmp_path)
    any_page.run_python()


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """The anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_are_valid(any_page: Any) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(any_page.text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = any_page.file.parent / file if file else any_page.file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_index_lists_every_page(root: Path) -> None:
    index = (root / "docs" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert named == {file.name for file in (root / "docs").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("name", ["mac", "mag", "mal"])
def test_pictures_are_current(name: str, root: Path, tmp_path: Path) -> None:
    file, committed = tmp_path / f"{name}.svg", root / "docs" / "pictures" / f"{name}.svg"
    assert cli.main(["diagram", name, "--out", str(file)]) == 0
    assert file.read_text("utf-8") == committed.read_text("utf-8"), f"titans-build diagram {name} --out {committed}"


@pytest.mark.parametrize("module", [analyze, cli, infer, train], ids=lambda module: module.PROGRAM.name)
def test_command_lines_are_accepted(module: Any, any_page: Any) -> None:
    for words in any_page.command_lines(module.PROGRAM.name):
        module.PROGRAM.parse(words)  # raises UsageError for an unknown option
