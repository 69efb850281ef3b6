"""The table of what a model is made of and what each part costs, readable at any width.

Figures are never cut. Where there is no room beside the tree, settings go under the name of their part, and in a
narrow terminal the figures do, too; the tree's branches go on past them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from rich.text import Text

from ...registry import show
from ..terminal import count, in_bytes, wrap
from .model_summary import LENGTH, ModelSummary, Part

HEADINGS = ("parameters", "FLOPs/token", "state/row")
GAP = "  "
COMFORT = 32
"""Columns that settings need for a place beside the name."""
MOST_SETTINGS = 6
"""Settings shown of one part."""


class _Row(NamedTuple):
    lead: str
    """The tree's branches before the name."""
    under: str
    """The branches before what goes on under the name."""
    name: Text
    settings: str
    figures: tuple[str, str, str]
    style: str = ""


def cost_table(found: ModelSummary, width: int) -> list[Text]:
    """A line with the headings, then every part and the totals, in lines of at most ``width``."""
    rows = [row for part in found.parts for row in _rows(part, "", "")]
    total = _figures(found.parameters, found.flops, found.state_bytes, found.grows)
    rows.append(_Row("", "", Text("total", style="bold"), "", total, "bold"))
    widths = [max(len(text) for text in column) for column in zip(HEADINGS, *(row.figures for row in rows))]

    def figures(row: tuple[str, str, str]) -> str:
        return GAP.join(text.rjust(wide) for text, wide in zip(row, widths))

    names = max(len(row.lead) + row.name.cell_len for row in rows)
    taken = names + len(GAP) + len(figures(HEADINGS))
    natural = max(len(row.settings) for row in rows)
    beside = min(natural, width - taken - len(GAP))
    lines: list[Text] = []
    if beside >= min(natural, COMFORT):
        head = f"{'part':<{names}}{GAP}{'settings':<{beside}}{GAP}"
        lines.append(Text(head + figures(HEADINGS), style="bold"))
        for row in rows:
            first, *more = _settings_lines(row.settings, beside)
            line = Text.assemble(_name(row), " " * (names - len(row.lead) - row.name.cell_len), GAP)
            line.append(f"{first:<{beside}}{GAP}", style="dim")
            lines.append(line.append(figures(row.figures), style=row.style))
            lines += [Text(f"{row.under:<{names}}{GAP}{text}", style="dim") for text in more]
    else:
        right = min(width, taken)
        head = figures(HEADINGS)
        lines += _beside_or_under(Text("part", style="bold"), "", head, "bold", right)
        for row in rows:
            lines += _beside_or_under(_name(row), row.under, figures(row.figures), row.style, right)
            lines += _settings_under(row, width)
    for line in lines:
        line.rstrip()
    return lines


def settings(part: Part) -> str:
    """The settings of a block that tell it from others, in a few words."""
    shown = [
        f"{key} {show(value).strip(chr(39))}"
        for key, value in part.fields.items()
        if not isinstance(value, bool) and value is not None
    ]
    return ", ".join(shown[:MOST_SETTINGS])


def _rows(part: Part, lead: str, indent: str) -> Iterator[_Row]:
    """The row of a part and those of the parts inside, with the tree's branches before their names."""
    times = f" ×{part.count}" if part.count > 1 else ""
    name = (
        part.label
        if part.type in ("", "layer")
        else part.type
        if part.label.startswith("blocks.")
        else f"{part.label}: {part.type}"
    )
    yield _Row(
        lead,
        indent + ("│ " if part.parts else "  "),
        Text.assemble((name, "" if lead else "bold"), (times, "bold magenta")),
        settings(part),
        _figures(part.parameters, part.flops, part.state_bytes, part.grows),
    )
    for index, child in enumerate(part.parts):
        last = index == len(part.parts) - 1
        yield from _rows(child, indent + ("└ " if last else "├ "), indent + ("  " if last else "│ "))


def _figures(parameters: int, flops: int, state: int, grows: bool) -> tuple[str, str, str]:
    size = f"{in_bytes(state)}{' +' if grows else ''}" if state or grows else "-"
    return count(parameters), count(flops / LENGTH), size


def _name(row: _Row) -> Text:
    return Text.assemble((row.lead, "dim"), row.name)


def _beside_or_under(name: Text, under: str, figures: str, style: str, width: int) -> list[Text]:
    """The figures end at ``width``: on the line of the name if both have room there, otherwise on the next."""
    shown = figures.lstrip()
    free = width - len(shown)
    if name.cell_len + len(GAP) <= free:
        return [Text.assemble(name, " " * (free - name.cell_len), (shown, style))]
    # the branches go on as far as there is nothing in their way
    branches = Text(under[: max(free - 1, 0)].ljust(free), style="dim")
    return [*wrap(name, width, under=Text(under, style="dim")), Text.assemble(branches, (shown, style))]


def _settings_under(row: _Row, width: int) -> list[Text]:
    under = row.under + "  "
    lines = _settings_lines(row.settings, max(width - len(under), 12)) if row.settings else []
    return [Text(under + line, style="dim") for line in lines]


def _settings_lines(text: str, width: int) -> list[str]:
    """``text`` in lines, a setting's name never parted from its value."""
    together = text.replace(", ", ",\n").replace(" ", "\u00a0").replace("\n", " ")
    lines = textwrap.wrap(together, width, break_on_hyphens=False) or [""]
    return [line.replace("\u00a0", " ") for line in lines]
