"""What the README shows runs as it is printed."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import titans_build as tb
from titans_build.recipes import packaged_names
from titans_build.registry import scratch
from titans_build.tools.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with scratch():
        # one session, in the order it is read
        exec(compile("\n".join(blocks("python")), "README.md", "exec", dont_inherit=True), {"__name__": "readme"})


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks("yaml")
    Path("my.yaml").write_text(recipe, encoding="utf-8")
    # a short text: the commands are what is tried, not the model
    Path("README.md").write_text(README[:200], encoding="utf-8")
    shown = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("titans-build ")]
    shown += re.findall(r"`(titans-build (?:list|describe|schema|kernels)[^`]*)`", README)
    assert len(shown) >= 9
    for line in shown:
        words = shlex.split(line, comments=True)[1:]
        assert main(words) == 0, (line, capsys.readouterr().err)


def test_the_tables_name_everything_there_is() -> None:
    first_cells = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    rows = {name for cell in first_cells for name in re.findall(r"`([\w-]+)`", cell)}
    assert set(tb.list_blocks()) <= rows
    assert {name for name in packaged_names() if not re.search(r"-[\d.]+[mb]$", name)} <= rows


def test_the_folders_are_there() -> None:
    folders = re.findall(r"^\| `(\w+)/` \|", README, flags=re.M)
    assert len(folders) == 7
    assert all((ROOT / folder).is_dir() for folder in folders if folder != "benchmarks")


def test_the_make_commands_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = re.findall(r"^([\w-][\w -]*):(?!=)", makefile, flags=re.M)
    targets = {target for rule in rules for target in rule.split()}
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.M)
    assert targets == set(phony.split()), "a target is a command, or it is a file below .venv"
    # what is shown is there, and what is there is shown: in the README, and at the head of the Makefile
    code = [*re.findall(r"`([^`\n]+)`", README), *(line for block in blocks("sh") for line in block.splitlines())]
    shown = {command.split()[1] for command in code if re.match(r"make [a-z]", command)}
    assert shown == targets
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
    for target in re.findall(r"^\| `make ([\w-]+)` \|", README, flags=re.M):
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_demo_is_the_command_that_is_shown() -> None:
    (told,) = re.findall(r"`make demo` runs `(titans-build [^`]+)`", README)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^demo:.*\n\t\.venv/bin/{re.escape(told)}$", makefile, flags=re.M)
