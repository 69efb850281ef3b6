"""What the README shows runs as it is printed."""

from __future__ import annotations

import re
import shlex
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


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert set(re.findall(r"make ([a-z][\w-]*) ", README)) & {"demo", "test", "test-slow", "check"} <= targets
