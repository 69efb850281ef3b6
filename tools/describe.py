"""``titans-build describe``: one block type, its fields and what it can stand as."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich.text import Text

from .. import recipes, registry
from ..recipes.reading import is_recipe_file
from ..registry import show
from .terminal import Columns, UsageError, edge, paragraphs, plain, say, say_columns, say_json, say_prose

SUMMARY = "Describe a block: what it computes, its fields, their types, defaults and meaning."
EXAMPLES = ("titans-build describe memory", "titans-build describe context --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The block."""
    parser.add_argument("block", metavar="BLOCK", help="the name of a block (see `titans-build list`)")


def run(arguments: argparse.Namespace) -> int:
    """Print what there is to know about the block."""
    refuse_recipe(arguments.block)
    description = registry.describe(arguments.block)
    if arguments.json:
        say_json(dataclasses.asdict(description))
        return 0
    say_prose(Text.assemble((description.name, "bold cyan"), f"  ({description.source}, {description.place})"), "")
    doc = plain(description.doc)
    width = edge()
    fits = width is None or all(len(line) <= width for line in doc.splitlines())
    say_prose(*(doc.splitlines() if fits else paragraphs(doc)), "")
    if description.protocols:
        say_prose(f"Can stand where a recipe needs: {', '.join(description.protocols)}", "")
    if not description.fields:
        say("It has no fields.")
        return 0
    table = Columns("field", "type", "default", "meaning")
    for field in description.fields:
        default = Text("required", style="yellow") if field.required else Text(show(field.default))
        table.add(Text(field.name, style="bold"), field.type, default, plain(field.description))
    say_columns(table)
    return 0


def refuse_recipe(name: str) -> None:
    """Raise ``UsageError`` when ``name`` is that of a recipe and of no block."""
    if name not in registry.list_blocks() and (name in recipes.packaged_names() or is_recipe_file(Path(name))):
        shown = show(name, 200)
        raise UsageError(
            f"{shown} is a recipe, not a block: `titans-build {name}` shows what it is made of, "
            f"`titans-build diagram {name}` draws it"
        )
