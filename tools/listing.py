"""``titans-build list``: the block types and the packaged recipes."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.resources
import itertools
import re

from rich.text import Text

from .. import recipes
from ..registry import describe, list_blocks, list_rows, nearest, show
from .terminal import Columns, UsageError, plain, say, say_columns, say_json, say_prose

SUMMARY = "List the blocks a recipe can name, with their defaults, and the recipes that come along."
EXAMPLES = (
    "titans-build list",
    "titans-build list '*mem*'      names that match a wildcard",
    "titans-build list --json | jq -r '.blocks[].name'",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pattern."""
    parser.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="a wildcard over names (default: all)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the blocks and the recipes whose names match."""
    pattern: str = arguments.pattern
    rows = list_rows(pattern)
    packaged = [name for name in recipes.packaged_names() if fnmatch.fnmatchcase(name, pattern)]
    if not rows and not packaged:
        names = [*list_blocks(), *recipes.packaged_names()]
        raise UsageError(f"no block and no recipe is called {show(pattern)}{nearest(pattern, names)}")
    fields = {row.name: describe(row.name).fields for row in rows if row.problem is None}
    if arguments.json:
        say_json(
            {
                "blocks": [
                    {
                        "name": row.name,
                        "summary": row.summary,
                        "source": row.source,
                        "problem": row.problem,
                        "fields": {
                            field.name: {"type": field.type, "required": field.required, "default": field.default}
                            for field in fields.get(row.name, [])
                            if row.problem is None
                        },
                    }
                    for row in rows
                ],
                "recipes": [{"name": name, "summary": summary(name)} for name in packaged],
            }
        )
        return 0
    if rows:
        table = Columns("block", "what it is", "fields and defaults")
        for row in rows:
            if row.problem is not None:
                table.add(row.name, Text(f"{row.problem} (from {row.source})", style="yellow"), "")
                continue
            source = "" if row.source == "titans_build" else f" (from {row.source})"
            table.add(
                Text(row.name, style="bold cyan"),
                plain(row.summary) + source,
                ", ".join(f.name if f.required else f"{f.name}={show(f.default)}" for f in fields[row.name]),
            )
        say_columns(table)
    if rows and packaged:
        say("")
    if packaged:
        table = Columns("recipe", "what it is", "sizes")
        for name in packaged:
            base = base_name(name)
            if base == name or base not in packaged:
                sizes = [other.removeprefix(f"{name}-") for other in sizes_of(name) if other in packaged]
                table.add(Text(name, style="bold cyan"), summary(name), " ".join(sizes))
        say_columns(table)
        if any(base_name(name) != name for name in packaged):
            say_prose("", Text("a size is part of the name: titans-build mac-170m", style="dim"))
    return 0


def summary(name: str) -> str:
    """The first sentence of the comment at the head of a packaged recipe's file."""
    text = importlib.resources.files(recipes).joinpath(f"{base_name(name)}.yaml").read_text(encoding="utf-8")
    comment = " ".join(
        line[1:].strip() for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    )
    sentence = re.split(r"\.(?: |$)", comment, maxsplit=1)[0]
    return sentence if base_name(name) == name else f"{sentence}; size {name.removeprefix(base_name(name) + '-')}"


def sizes_of(name: str) -> list[str]:
    """The packaged recipes that are sizes of one: ``mac-170m`` of ``mac``."""
    return [other for other in recipes.packaged_names() if other != name and base_name(other) == name]


def base_name(name: str) -> str:
    """``mac`` of ``mac-170m``; a recipe that is no size of another is its own base."""
    base = name.rpartition("-")[0]
    return base if base in recipes.packaged_names() else name
