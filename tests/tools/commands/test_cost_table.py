"""The table of costs at every width: figures are never cut, and no part and no setting is lost."""

from __future__ import annotations

import re

import pytest

import titans_build as tb
from titans_build.tools.commands.cost_table import cost_table
from titans_build.tools.commands.model_summary import ModelSummary, on_meta, summarize
from titans_build.tools.terminal import count, in_bytes

NAMES = ["mac", "mag", "two-memories", "transformer", "mac-1.3b"]


def summary_of(name: str, **overrides: object) -> ModelSummary:
    recipe = tb.load_recipe(name, overrides)
    return summarize(on_meta(recipe), recipe)


def lines(found: ModelSummary, width: int) -> list[str]:
    return [line.plain for line in cost_table(found).lines(width)]


def words(found: ModelSummary, width: int) -> list[str]:
    """The text without headings and the branches of the tree."""
    text = re.sub("[│├└]|part|(parameters|FLOPs/token|state/row):?", " ", "\n".join(lines(found, width)))
    return sorted(text.split())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [36, 40, 52, 60, 72, 80, 100, 120])
def test_the_table_fits_every_width_without_losing_words(name: str, width: int) -> None:
    found = summary_of(name)
    assert all(len(line) <= width and line == line.rstrip() for line in lines(found, width))
    assert words(found, width) == words(found, 1000)


def test_figures_are_aligned_and_whole() -> None:
    found = summary_of("mac")
    figures = [count(found.parameters), count(found.flops / 2048), in_bytes(found.state_bytes)]
    for width in (80, 160):
        head, *rows = (line for line in lines(found, width) if re.search(r"(?:row|[KMG]iB| B| -)$", line))
        assert head.split() == ["part", "parameters", "FLOPs/token", "state/row"]
        assert rows[-1].split(maxsplit=3) == ["total", *figures]
        assert len(rows) == 11 and {len(row) for row in rows} == {len(head)}


def test_branches_continue_past_settings() -> None:
    table = lines(summary_of("mac"), 80)
    context = next(index for index, line in enumerate(table) if line.startswith("├ context"))
    assert table[context + 1] == "│ │   segment 128, persistent 16,"
    assert table[context + 2] == "│ │   write attended, form sigmoid"
    assert table[context + 3].startswith("│ ├ memory")


def test_in_a_narrow_terminal_figures_are_below_the_names() -> None:
    table = lines(summary_of("mac"), 40)
    attend = table.index("│ ├ attend: attention")
    assert table[attend + 2 :][:3] == ["  parameters: 262,656", "  FLOPs/token: 984,064", "  state/row: 542.0 KiB"]


def test_growing_state_is_marked_at_any_width() -> None:
    found = summary_of("transformer", **{"layers.plain.0.window": None})
    for width in (40, 80, 160):
        assert lines(found, width)[-1].endswith(" +")
