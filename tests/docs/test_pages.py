"""Every page of docs/ and the README: its code runs, its links lead somewhere, its pictures are current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, command_lines, fences, run_python

from titans_build.registry import scratch
from titans_build.tools import tasks
from titans_build.tools.cli import main


@pytest.mark.parametrize("name", [name for name, file in PAGES.items() if fences(file.read_text("utf-8"), "python")])
def test_the_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with scratch(), tasks.scratch():
        run_python(PAGES[name].read_text(encoding="utf-8"), name)


def anchors(text: str) -> set[str]:
    """What can be linked to inside of a page: its headings, as they are made into anchors."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_index_names_every_page() -> None:
    index = PAGES["README.md"].read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert named == set(PAGES) - {"README.md", "/README.md"}


def test_every_picture_is_what_its_command_draws(tmp_path: Path) -> None:
    drawn = {file.stem for file in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert drawn == {"mac", "mag", "mal"}
    for name in drawn:
        file = tmp_path / f"{name}.svg"
        assert main(["diagram", name, "--out", str(file)]) == 0
        now = (ROOT / "docs" / "pictures" / file.name).read_text(encoding="utf-8")
        assert file.read_text(encoding="utf-8") == now, f"titans-build diagram {name} --out docs/pictures/{name}.svg"


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_ones_that_there_are(name: str) -> None:
    from titans_build.tools import analyze, cli, infer, train

    programs = {module.PROGRAM.name: module.PROGRAM for module in (analyze, cli, infer, train)}
    text = PAGES[name].read_text(encoding="utf-8")
    for program in programs.values():
        for words in command_lines(text, program.name):
            program.parse(words)  # raises where there is no such option
