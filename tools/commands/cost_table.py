"""The table of what a model is made of and what each part costs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.text import Text

from ...registry import list_blocks, lookup, show
from ..terminal import Columns, count, in_bytes
from .model_summary import LENGTH, ModelSummary, Part

FIGURES = ("parameters", "FLOPs/token", "state/row")
MOST_SETTINGS = 6
"""Settings shown of one part."""
SETTINGS_WIDTH = 40
"""Columns that the settings below a part's name take at most."""


def cost_table(found: ModelSummary) -> Columns:
    """A row for every part, as a tree, and one for the totals."""
    table = Columns("part", *FIGURES, right=FIGURES)
    for part in found.parts:
        for name, figures in _rows(part):
            table.add(name, *figures)
    total = _figures(found.parameters, found.flops, found.state_bytes, found.grows)
    table.add(*(Text(cell, style="bold") for cell in ("total", *total)))
    return table


def settings(part: Part) -> str:
    """A few settings of a block: those that are not the defaults, then the first."""
    fields = lookup(part.type).fields if part.type in list_blocks() else {}
    shown = {key: x for key, x in part.fields.items() if not isinstance(x, bool) and x is not None}
    first = sorted(shown, key=lambda key: key in fields and fields[key].default == shown[key])[:MOST_SETTINGS]
    return ", ".join(f"{key} {show(value).strip(chr(39))}" for key, value in shown.items() if key in first)


def _rows(part: Part, branch: str = "", indent: str = "") -> Iterator[tuple[Text, tuple[str, str, str]]]:
    """The name, settings and figures of a part, then of those inside. ``branch``: the tree's lines before the name."""
    name = f"{part.label}: {part.type}"
    if part.type in ("", "layer"):
        name = part.label
    elif part.label.startswith("blocks."):
        name = part.type
    times = f" ×{part.count}" if part.count > 1 else ""
    text = Text.assemble((branch, "dim"), (name, "" if branch else "bold"), (times, "bold magenta"))
    under = indent + ("│   " if part.parts else "    ")
    # a setting's name stays on the line of its value
    words = settings(part).replace(", ", ",\n").replace(" ", "\u00a0").replace("\n", " ")
    for line in textwrap.wrap(words, SETTINGS_WIDTH - len(under), break_on_hyphens=False):
        text.append("\n" + under + line.replace("\u00a0", " "), style="dim")
    yield text, _figures(part.parameters, part.flops, part.state_bytes, part.grows)
    own = {name: size for name, size in part.state.items() if part.parts and name not in [p.label for p in part.parts]}
    for index, child in enumerate(part.parts):
        last = index == len(part.parts) - 1 and not own
        yield from _rows(child, indent + ("└ " if last else "├ "), indent + ("  " if last else "│ "))
    if own:  # such as the snapshot of the memory that a context reads
        yield Text.assemble((indent + "└ ", "dim"), ", ".join(own)), ("-", "-", in_bytes(sum(own.values())))


def _figures(parameters: int, flops: int, state: int, grows: bool) -> tuple[str, str, str]:
    size = f"{in_bytes(state)}{' +' if grows else ''}" if state or grows else "-"
    return count(parameters), count(flops / LENGTH), size
