"""What docs/data.md shows is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import titans_build as tb
from titans_build.recipes.parse import read_value
from titans_build.tools import tasks

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SPECS = re.findall(r"^\| `([^`]+)` \|", PAGE.partition("## Splits")[0], flags=re.M)


@pytest.mark.parametrize("spec", SPECS)
def test_specifications_of_the_page_open(spec: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    source = tb.open_source(read_value(spec) if spec.startswith("{") else spec, rows=2)
    assert source.batch(0).tokens.shape == (2, source.length)


def test_page_lists_every_task():
    assert len(SPECS) >= 7
    assert re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Tasks")[2], flags=re.M) == [
        "copy", "repeat", "needle", "needle_kv", "mqar", "recall", "selective_copy", "compression", "memorization",
        "state_tracking", "automaton", "forecast",
    ]  # fmt: skip
    with tasks.scratch():
        assert sorted(tb.list_tasks()) == sorted(
            re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Tasks")[2], flags=re.M)
        )


def test_example_task_of_the_page():
    code = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)[-1]
    with tasks.scratch():
        scope: dict[str, tb.Task] = {}
        exec(code, scope)
        batch = tb.open_source("parity:length=8", rows=4).batch(0)
        assert (batch.targets[:, -1] == batch.tokens.sum(1) % 2).all()
