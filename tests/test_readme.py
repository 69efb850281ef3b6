"""What the README shows is so: its commands run, and what it says of the Makefile is in it. Its Python: tests/docs."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pages import PAGES, ROOT, command_lines, fences

from titans_build.tools.cli import main

README = PAGES["/README.md"].read_text(encoding="utf-8")
DEVELOPMENT = PAGES["development.md"].read_text(encoding="utf-8")


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (recipe,) = fences(README, "yaml")
    Path("my.yaml").write_text(recipe, encoding="utf-8")
    # a short text: the commands are what is tried, not the model
    Path("README.md").write_text(README[:200], encoding="utf-8")
    shown = command_lines(README, "titans-build")
    shown += [line.split()[1:] for line in re.findall(r"`(titans-build (?:list|desc|schema|kern|diag)[^`]*)`", README)]
    assert len(shown) >= 11
    for words in shown:
        assert main(words) == 0, (words, capsys.readouterr().err)


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_the_folders_are_there() -> None:
    folders = re.findall(r"^\| `(\w+)/` \|", DEVELOPMENT, flags=re.M)
    assert len(folders) == 8
    assert all((ROOT / folder).is_dir() for folder in folders if folder != "benchmarks")


def test_the_make_commands_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = re.findall(r"^([\w-][\w -]*):(?!=)", makefile, flags=re.M)
    targets = {target for rule in rules for target in rule.split()}
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.M)
    assert targets == set(phony.split()), "a target is a command, or it is a file below .venv"
    # what is shown is there, and what is there is shown: to who works on it, and at the head of the Makefile
    for page in (README, DEVELOPMENT):
        code = [*re.findall(r"`([^`\n]+)`", page), *"".join(fences(page, "sh")).splitlines()]
        shown = {command.split()[1] for command in code if re.match(r"make [a-z]", command)}
        assert shown == targets if page is DEVELOPMENT else {"demo", "test"} <= shown <= targets
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), makefile.splitlines()))
    named = {
        target
        for words in re.findall(r"make ((?:[a-z][a-z_-]*(?: |$))+)", head, flags=re.M)
        for target in words.split()
    }
    assert targets <= named


def test_make_knows_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for target in re.findall(r"^\| `make ([\w-]+)` \|", DEVELOPMENT, flags=re.M):
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_demo_is_the_command_that_is_shown() -> None:
    (told,) = re.findall(r"`make demo` runs `(titans-build [^`]+)`", README)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^demo:.*\n\t\.venv/bin/{re.escape(told)}$", makefile, flags=re.M)
