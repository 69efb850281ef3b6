"""The pages of the documentation, and what tests do with them."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from titans_build.kernels import dispatch
from titans_build.kernels.memory.learner.parts import CATALOGUES
from titans_build.registry import scratch
from titans_build.tools import tasks

ROOT = Path(__file__).parents[2]
PAGES = {file.name: file for file in sorted((ROOT / "docs").glob("*.md"))} | {"/README.md": ROOT / "README.md"}
"""All pages by name. The name of the repository's README starts with a slash."""


class Page:
    """A page of the documentation."""

    def __init__(self, name: str) -> None:
        self.name, self.file = name, PAGES[name]
        self.text = self.file.read_text(encoding="utf-8")

    def fences(self, language: str) -> list[str]:
        """The code blocks in a language, in the order of the page."""
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, flags=re.M | re.S)

    def command_lines(self, command: str) -> list[list[str]]:
        """The words after ``command`` of each line of a shell block that calls it."""
        lines = [line for block in self.fences("sh") for line in block.splitlines()]
        return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{command} ")]

    def run_python(self) -> dict[str, object]:
        """Run the Python code of the page as one session and return its variables."""
        scope: dict[str, object] = {"__name__": "page"}
        # at the line numbers of the page, so that an error names the right line
        lines = [""] * len(self.text.splitlines())
        for match in re.finditer(r"^```python\n(.*?)^```$", self.text, flags=re.M | re.S):
            first = self.text[: match.start(1)].count("\n")
            for offset, line in enumerate(match[1].splitlines()):
                lines[first + offset] = line
        exec(compile("\n".join(lines), self.name, "exec", dont_inherit=True), scope)
        return scope


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument ``any_page`` runs for every page."""
    if "any_page" in metafunc.fixturenames:
        metafunc.parametrize("any_page", [Page(name) for name in PAGES], ids=list(PAGES))


@pytest.fixture
def page(request: pytest.FixtureRequest) -> Page:
    """The page that the test's module names in ``PAGE``."""
    return Page(request.module.PAGE)


@pytest.fixture
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks, parts of learners, tasks and operations that a page registers are gone afterwards."""
    monkeypatch.setattr(dispatch, "OPERATIONS", dict(dispatch.OPERATIONS))
    with contextlib.ExitStack() as stack:
        for registered in (scratch, tasks.scratch, *(parts.scratch for parts in CATALOGUES.values())):
            stack.enter_context(registered())
        yield
