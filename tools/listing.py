"""``titans-build list``: the block types and the packaged recipes."""

from __future__ import annotations

import argparse
import fnmatch

from rich.text import Text

from .. import recipes
from ..registry import describe, list_rows, nearest, show
from ..registry.catalogue import known_names
from .terminal import Failure, columns, say, say_json

SUMMARY = "List the blocks a recipe can name, with their defaults, and the recipes that come along."
EXAMPLES = (
    "titans-build list",
    "titans-build list '*mem*'      names that match a wildcard",
    "titans-build list --json | jq -r '.blocks[].name'",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="a wildcard over names (default: all)")


def run(arguments: argparse.Namespace) -> int:
    pattern: str = arguments.pattern
    rows = list_rows(pattern)
    packaged = {name: text for name, text in recipes.packaged().items() if fnmatch.fnmatchcase(name, pattern)}
    if not rows and not packaged:
        raise Failure(f"no block and no recipe is called {show(pattern)}{nearest(pattern, [*known_names(), *recipes.packaged()])}")
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
                "recipes": [{"name": name, "summary": summary} for name, summary in packaged.items()],
            }
        )
        return 0
    if rows:
        table = columns("block", "what it is", "fields and defaults")
        for row in rows:
            if row.problem is not None:
                table.add_row(row.name, Text(f"{row.problem} (from {row.source})", style="yellow"), "")
                continue
            source = "" if row.source == "titans_build" else f" (from {row.source})"
            table.add_row(
                Text(row.name, style="bold cyan"),
                row.summary + source,
                ", ".join(f.name if f.required else f"{f.name}={show(f.default)}" for f in fields[row.name]),
            )
        say(table)
    if rows and packaged:
        say("")
    if packaged:
        table = columns("recipe", "what it is")
        for name, summary in packaged.items():
            table.add_row(Text(name, style="bold cyan"), summary)
        say(table)
    return 0
