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


def words(found: ModelSummary, width: int) -> list[str]:
    """What is said, without the tree's branches."""
    return sorted(re.sub("[│├└]", " ", "\n".join(line.plain for line in cost_table(found, width))).split())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [36, 40, 52, 60, 72, 80, 100, 120])
def test_the_table_fits_every_width_without_losing_words(name: str, width: int) -> None:
    found = summary_of(name)
    lines = [line.plain for line in cost_table(found, width)]
    assert all(len(line) <= width and line == line.rstrip() for line in lines)
    whole = words(found, 1000)
    # a heading that has no place of its own is left out
    assert [word for word in words(found, width) if word != "settings"] == [w for w in whole if w != "settings"]


@pytest.mark.parametrize("width", [20, 24, 40, 80, 160])
def test_figures_are_aligned_and_whole(width: int) -> None:
    found = summary_of("mac")
    lines = [line.plain for line in cost_table(found, width)]
    figures = [count(found.parameters), count(found.flops / 2048), in_bytes(found.state_bytes)]
    assert re.search(r"\s+".join(map(re.escape, figures)) + "$", lines[-1])
    if width >= 36:
        rows = [line for line in lines if re.search(r"(?:[KMG]iB| B| -)$", line)]
        assert len({len(row) for row in rows}) == 1
        ends = {row.rindex("  ", 0, len(row) - 9) for row in rows if row.endswith("MiB")}
        assert len(ends) <= 2 and len(rows) == 10


def test_branches_continue_past_settings() -> None:
    lines = [line.plain for line in cost_table(summary_of("mac"), 80)]
    context = next(index for index, line in enumerate(lines) if line.startswith("├ context"))
    assert lines[context + 1] == "│ │   segment 128, persistent 16, write attended, form sigmoid"
    assert lines[context + 2].startswith("│ ├ memory")


def test_in_a_narrow_table_figures_go_under_long_names() -> None:
    lines = [line.plain for line in cost_table(summary_of("mac"), 40)]
    attend = lines.index("│ └ attend: attention")
    assert re.fullmatch(r"│ {6,}262,656      984,064  542\.0 KiB", lines[attend + 1])


def test_in_a_wide_table_settings_are_beside_the_names() -> None:
    lines = [line.plain for line in cost_table(summary_of("mac"), 100)]
    assert lines[0].split() == ["part", "settings", "parameters", "FLOPs/token", "state/row"]
    memory = next(index for index, line in enumerate(lines) if "memory: memory" in line)
    assert "heads 4, depth 2, expansion 4," in lines[memory]
    assert lines[memory + 1].split(maxsplit=1)[0] == "│" and lines[memory + 1].endswith("conv 4")


def test_growing_state_is_marked_at_any_width() -> None:
    found = summary_of("transformer", **{"layers.plain.0.window": None})
    for width in (40, 80, 160):
        assert cost_table(found, width)[-1].plain.endswith(" +")
