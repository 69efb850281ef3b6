"""docs/foreign-blocks.md: its commands run, its tables name what there is, and what it quotes is said."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.blocks.foreign import Adapted
from titans_build.registry import lookup
from titans_build.tools.cli import main

PAGE = "foreign-blocks.md"


def test_its_commands_run(page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lines = page.command_lines("titans-build")
    assert len(lines) == 5
    for words in lines:
        assert main(words) == 0, (words, capsys.readouterr().err)
        assert "warning" not in capsys.readouterr().err


def test_its_table_names_every_foreign_block(page: Any) -> None:
    (table,) = re.findall(r"\| blocks \|.*?\n\n", page.text, flags=re.S)
    named = {name for row in table.rstrip().splitlines()[2:] for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    built_in = {name for name in tb.list_blocks() if lookup(name).source == "titans_build"}
    assert named == {name for name in built_in if issubclass(lookup(name).cls, Adapted)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_quotes_what_is_said_without_a_gpu(
    page: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["deltas-and-mac", "--set", "layers.delta.0=fla_gated_deltanet"]) == 2
    (quoted,) = page.fences("text")
    assert " ".join(quoted.split()) in " ".join(capsys.readouterr().err.split())
