"""``titans-build schema``: a JSON Schema for editors, and the same as a page to read."""

from __future__ import annotations

import argparse

from .. import recipes
from ..registry import block_schema, list_rows
from .describe import refuse_recipe
from .reference import block_section, recipe_page
from .terminal import say, say_json

SUMMARY = "Print the JSON Schema of recipe files, or of one block, for editors that complete and underline."
EXAMPLES = (
    "titans-build schema > titans-recipe.schema.json",
    "titans-build schema memory",
    "titans-build schema --markdown > recipes.md    the reference of all blocks, installed ones too",
    "put `# yaml-language-server: $schema=titans-recipe.schema.json` at the top of a recipe to use it",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The block, if it is to be of one."""
    parser.add_argument("block", nargs="?", metavar="BLOCK", help="one block's schema instead of the whole recipe's")
    parser.add_argument("--markdown", action="store_true", help="a page to read instead of a schema for editors")


def run(arguments: argparse.Namespace) -> int:
    """Print the schema."""
    if arguments.block is not None:
        refuse_recipe(arguments.block)
    if arguments.markdown:
        usable = [row.name for row in list_rows() if row.problem is None]
        page = recipe_page(usable) if arguments.block is None else "\n\n".join(block_section(arguments.block)) + "\n"
        if arguments.json:
            say_json({"markdown": page})
        else:
            say(*page.splitlines())
        return 0
    # always JSON: --json changes nothing
    say_json(recipes.recipe_schema() if arguments.block is None else block_schema(arguments.block))
    return 0
