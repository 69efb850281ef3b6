"""``titans-build schema``: a JSON Schema for editors."""

from __future__ import annotations

import argparse

from .. import recipes
from ..registry import block_schema
from .describe import refuse_recipe
from .terminal import say_json

SUMMARY = "Print the JSON Schema of recipe files, or of one block, for editors that complete and underline."
EXAMPLES = (
    "titans-build schema > titans-recipe.schema.json",
    "titans-build schema memory",
    "put `# yaml-language-server: $schema=titans-recipe.schema.json` at the top of a recipe to use it",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The block, if it is to be of one."""
    parser.add_argument("block", nargs="?", metavar="BLOCK", help="one block's schema instead of the whole recipe's")


def run(arguments: argparse.Namespace) -> int:
    """Print the schema."""
    if arguments.block is not None:
        refuse_recipe(arguments.block)
    # always JSON: --json is accepted and changes nothing
    say_json(recipes.recipe_schema() if arguments.block is None else block_schema(arguments.block))
    return 0
