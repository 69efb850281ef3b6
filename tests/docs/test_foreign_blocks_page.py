"""docs/foreign-blocks.md: commands run, the table is complete, and the quoted error is printed."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.blocks.foreign import Adapted
from titans_build.registry import lookup
from titans_build.tools.cli import main

PAGE = "foreign-blocks.md"


def test_commands_run(page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lines = page.command_lines("titans-build")
    assert len(lines) == 5
    for words in lines:
        assert main(words) == 0, (words, capsys.readouterr().err)
        assert "warning" not in capsys.readouterr().err


def test_the_table_lists_all_foreign_blocks(page: Any) -> None:
    (table,) = re.findall(r"\| blocks \|.*?\n\n", page.text, flags=re.S)
    named = {name for row in table.rstrip().splitlines()[2:] for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    built_in = {name for name in tb.list_blocks() if lookup(name).source == "titans_build"}
    assert named == {name for name in built_in if issubclass(lookup(name).cls, Adapted)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_error_without_a_gpu_is_quoted(
    page: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("fla.layers")  # while Triton has the mode in which other tests may have imported it
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["deltas-and-mac", "--set", "layers.delta.0=fla_gated_deltanet"]) == 2
    (quoted,) = page.fences("text")
    assert " ".join(quoted.split()) in " ".join(capsys.readouterr().err.split())
