"""``titans-build describe``: one block type, its fields and what it can stand as."""

from __future__ import annotations

import argparse
import dataclasses

from rich.text import Text

from .. import registry
from ..registry import show
from .terminal import columns, plain, say, say_json

SUMMARY = "Describe a block: what it computes, its fields, their types, defaults and meaning."
EXAMPLES = ("titans-build describe memory", "titans-build describe context --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("block", metavar="BLOCK", help="the name of a block (see `titans-build list`)")


def run(arguments: argparse.Namespace) -> int:
    description = registry.describe(arguments.block)
    if arguments.json:
        say_json(dataclasses.asdict(description))
        return 0
    say(Text.assemble((description.name, "bold cyan"), f"  ({description.source}, {description.place})"))
    say("", plain(description.doc), "")
    if description.protocols:
        say(f"Can stand where a recipe needs: {', '.join(description.protocols)}", "")
    if not description.fields:
        say("It has no fields.")
        return 0
    table = columns("field", "type", "default", "meaning")
    for field in description.fields:
        default = Text("required", style="yellow") if field.required else Text(show(field.default))
        table.add_row(Text(field.name, style="bold"), field.type, default, plain(field.description))
    say(table)
    return 0
