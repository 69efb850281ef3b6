"""The pages of documentation: what is in them, and running it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {file.name: file for file in sorted((ROOT / "docs").glob("*.md"))} | {"/README.md": ROOT / "README.md"}
"""Every page by its name; that of the repository has a slash before it."""


def fences(text: str, language: str) -> list[str]:
    """The code blocks in a language, in the order of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def run_python(text: str, name: str) -> dict[str, object]:
    """Run the page's Python as one session, in the order it is read, and return what there then is."""
    scope: dict[str, object] = {"__name__": "page"}
    # lines of the page, so that an error says where it is
    lines = [""] * len(text.splitlines())
    for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.M | re.S):
        first = text[: match.start(1)].count("\n")
        for offset, line in enumerate(match[1].splitlines()):
            lines[first + offset] = line
    exec(compile("\n".join(lines), name, "exec", dont_inherit=True), scope)
    return scope


def command_lines(text: str, command: str) -> list[list[str]]:
    """The words after ``command`` of each line of a shell block that calls it."""
    lines = [line for block in fences(text, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{command} ")]
